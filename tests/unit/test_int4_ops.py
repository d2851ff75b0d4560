"""The operators of 4-bit weights as torch sees them: references, layouts, errors, tracing, compilation."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from int4_cases import draw, error
from torch import Tensor

from qexp.kernels import build, int4, matmul, ops

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("target", ["reference", "cpu"])
@pytest.mark.parametrize(("n", "k", "group"), [(1, 2, 0), (15, 8, 8), (16, 10, 0), (33, 64, 16), (40, 256, 128)])
def test_layouts_keep_every_code(n: int, k: int, group: int, target: str) -> None:
    case = draw(1, n, k, group, asymmetric=True)
    packed = case.packed(target)
    assert torch.equal(int4.unprepack_w4(packed.w_p), case.q)
    assert int4.read_header(packed.w_p) == int4.Header(target, n, k, group)


@pytest.mark.parametrize(("n", "k"), [(1, 2), (16, 8), (17, 10), (31, 1000)])
def test_compiled_layout_is_the_documented_one(n: int, k: int) -> None:
    packed = int4.pack_int4(draw(1, n, k, 0).q)
    w_p = int4.prepack_w4(packed, torch.ones(n), None, 0, "cpu")[0]
    assert torch.equal(w_p, int4.p16k8_reference(packed, 0))
    codes = w_p[int4.HEADER_BYTES :].reshape(-1, -(-k // 8), 16, 4)
    q = int4.unpack_int4(packed)
    for column, row in ((0, 0), (n - 1, k - 1), (n // 2, k // 2)):
        byte = int(codes[column // 16, row // 8, column % 16, row % 4])
        assert (byte >> (4 * (row % 8 // 4))) % 16 - 8 == int(q[column, row])


@pytest.mark.parametrize("group", [0, 16])
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("target", ["reference", "cpu"])
def test_references_are_the_formula(group: int, asymmetric: bool, target: str) -> None:
    case = draw(3, 21, 64, group, asymmetric=asymmetric, bias=True)
    weight = case.packed(target)
    args = (case.a_scale, None, *weight, case.bias, torch.float32)
    assert error(matmul.w4a8_reference(case.a, *args), case.answer()) < 2e-7
    small = case.a >> 4
    for given in (small, int4.pack_int4(small)):
        assert error(matmul.w4a4_reference(given, *args), case.answer(small)) < 2e-7
    x = torch.randn(3, 64)
    want = x.double() @ case.weight().T + case.bias.double()
    assert error(matmul.w4a16_reference(x, *weight, case.bias), want) < 1e-6
    assert torch.equal(matmul.w4a8_i32_reference(case.a, weight.w_p, 21), case.integers())


def test_packing_checks_and_inverts() -> None:
    q = draw(1, 5, 12, 0).q
    assert torch.equal(int4.unpack_int4(int4.pack_int4(q)), q)
    assert torch.equal(int4.pack_int4(q.T.contiguous().T), int4.pack_int4_reference(q))
    assert int4.pack_int4(q[:0]).shape == (0, 6)
    for low in (-9, 8, 127, -128):
        with pytest.raises(RuntimeError, match=r"q: got values .*expected .*"):
            int4.pack_int4(torch.tensor([[0, low]], dtype=torch.int8))


def test_auto_layout_is_what_computes_here() -> None:
    assert int4.read_header(draw(1, 4, 8, 0).packed().w_p).layout == ("cpu" if build.load() else "reference")


def broken() -> dict[str, tuple[str, Callable[[], object]]]:
    """Name -> what the message says, the call that must say it."""
    case = draw(2, 20, 32, 16, bias=True)
    w, a, s = case.packed(), case.a, case.a_scale
    packed = int4.pack_int4(case.q)

    def w4a8(a: Tensor = a, s: Tensor = s, sums: Tensor | None = None, w: matmul.W4 = w, **more: object) -> object:
        given = {"bias": None, "out_dtype": torch.float32, **more}
        return matmul.w4a8(a, s, sums, w, given["bias"], given["out_dtype"])

    def prepack(
        w_q: Tensor = packed, scale: Tensor = case.scale, zero: Tensor | None = None, group: int = 16, to: str = "cpu"
    ) -> object:
        return int4.prepack_w4(w_q, scale, zero, group, to)

    nan = case.scale.clone()
    nan[3, 1] = torch.nan
    x = torch.randn(2, 32)
    other = bytearray(w.w_p.numpy().tobytes())
    other[5] = 3
    cut = w._replace(w_p=w.w_p[:-1].clone())
    return {
        "a_q dtype": (r"a_q: got .*expected", lambda: w4a8(a.int())),
        "a_q rank": (r"a_q: got .*expected .*\[M, K\]", lambda: w4a8(a[0])),
        "K": (r"K: got 24, expected 32", lambda: w4a8(a[:, :24])),
        "a_scale dtype": (r"a_scale: got .*expected", lambda: w4a8(s=s.double())),
        "a_scale shape": (r"a_scale: got .*expected .*\[?2", lambda: w4a8(s=s[:1])),
        "a_sums dtype": (r"a_sums: got .*expected", lambda: w4a8(sums=torch.zeros(2, 2))),
        "a_sums shape": (r"a_sums: got .*expected", lambda: w4a8(sums=torch.zeros(2, 1, dtype=torch.int32))),
        "n": (r"n: got 19, expected 20", lambda: w4a8(w=w._replace(n=19))),
        "group": (r"group: got 8, expected 16", lambda: w4a8(w=w._replace(group=8))),
        "w_p dtype": (r"w_p: got .*expected", lambda: w4a8(w=w._replace(w_p=w.w_p.int()))),
        "w_p canonical": (r"w_p: got .*expected", lambda: w4a8(w=w._replace(w_p=packed.flatten()))),
        "w_p cut": (r"w_p: got .*expected|invalid for input", lambda: w4a8(w=cut)),
        "w_p layout": (
            r"w_p: got layout .*expected",
            lambda: w4a8(w=w._replace(w_p=torch.tensor(list(other), dtype=torch.uint8))),
        ),
        "w_s dtype": (r"w_s: got .*expected", lambda: w4a8(w=w._replace(w_s=w.w_s.double()))),
        "bias shape": (r"bias: got .*expected", lambda: w4a8(bias=case.bias[:7])),
        "bias dtype": (r"bias: got .*expected", lambda: w4a8(bias=torch.zeros(20, dtype=torch.int32))),
        "out_dtype": (r"out_dtype: got .*expected", lambda: w4a8(out_dtype=torch.float64)),
        "w4a4 dtype": (r"a_q: got .*expected", lambda: matmul.w4a4(a.short(), s, None, w, None, torch.float32)),
        "x dtype": (r"x: got .*expected", lambda: matmul.w4a16(x.double(), w, None)),
        "x rank": (r"x: got .*expected", lambda: matmul.w4a16(x[0], w, None)),
        "x grad": (r"requires a gradient, expected none", lambda: matmul.w4a16(x.requires_grad_(), w, None)),
        "i32 K": (r"K: got 16, expected 32", lambda: matmul.w4a8_i32(a[:, :16].contiguous(), w.w_p, 20)),
        "w_q dtype": (r"w_q: got .*expected", lambda: prepack(packed.int())),
        "w_q empty": (r"w_q: got .*not empty", lambda: prepack(packed[:0])),
        "scale shape": (r"scale: got shape .*expected \[20, 2\]", lambda: prepack(scale=case.scale[:, :1])),
        "scale dtype": (r"scale: got .*expected", lambda: prepack(scale=case.scale.double())),
        "scale finite": (r"scale: got .*not finite", lambda: prepack(scale=nan)),
        "zero unsigned": (
            r"zero: got uint8, expected the signed",
            lambda: prepack(zero=torch.zeros(20, 2, dtype=torch.uint8)),
        ),
        "group size": (r"group: got 12, expected 0 or a multiple of 8", lambda: prepack(group=12)),
        "group divides": (r"group: got 24, expected .*divides K=32", lambda: prepack(group=24)),
        "target": (r"target: got 'gpu', expected auto", lambda: prepack(to="gpu")),
        "pack odd": (r"q: got .*even", lambda: int4.pack_int4(case.q[:, :3])),
        "pack dtype": (r"q: got .*expected", lambda: int4.pack_int4(case.q.int())),
    }


@pytest.mark.parametrize("name", list(broken()))
def test_wrong_input_is_named(name: str) -> None:
    message, call = broken()[name]
    with pytest.raises(RuntimeError, match=message):
        call()


def test_no_rows_is_no_error() -> None:
    case = draw(0, 20, 32, 16, bias=True)
    assert matmul.w4a8(case.a, case.a_scale, None, case.packed(), case.bias, torch.bfloat16).shape == (0, 20)
    assert matmul.w4a16(torch.empty(0, 32), case.packed(), None).shape == (0, 20)
    assert matmul.w4a8_i32(case.a, case.packed().w_p, 20).shape == (0, 20)


def calls(m: int = 3) -> dict[str, tuple[object, ...]]:
    """Operator -> arguments that are right."""
    case = draw(m, 20, 32, 16, asymmetric=True, bias=True)
    w, small = case.packed(), case.a >> 4
    sums = case.a.reshape(m, 2, 16).sum(2, dtype=torch.int32)
    return {
        "pack_int4": (case.q,),
        "unpack_int4": (int4.pack_int4(case.q),),
        "p16k8": (int4.pack_int4(case.q), 16),
        "prepack_w4": (int4.pack_int4(case.q), case.scale, case.zero, 16, "auto"),
        "w4a8": (case.a, case.a_scale, sums, *w, case.bias, torch.bfloat16),
        "w4a4": (int4.pack_int4(small), case.a_scale, None, *w, None, torch.float32),
        "w4a16": (torch.randn(m, 32), *w, case.bias),
        "w4a8_i32": (case.a, w.w_p, 20),
    }


@pytest.mark.parametrize("op", list(calls()))
def test_torch_finds_the_operators_sound(op: str) -> None:
    torch.library.opcheck(getattr(torch.ops.qexp, op).default, calls()[op])


@pytest.mark.parametrize("op", list(calls()))
def test_shapes_without_data(op: str) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    real = getattr(torch.ops.qexp, op)(*calls()[op])
    with FakeTensorMode() as mode:
        given = [mode.from_tensor(x) if isinstance(x, Tensor) else x for x in calls()[op]]
        fake = getattr(torch.ops.qexp, op)(*given)
    listed = [[out] if isinstance(out, Tensor) else out for out in (real, fake)]
    for one, two in zip(*listed, strict=True):
        assert (one.shape, one.dtype, one.stride()) == (two.shape, two.dtype, two.stride())


def test_compiles_without_a_break() -> None:
    case = draw(4, 20, 32, 16)
    weight = case.packed()

    def layer(x: Tensor) -> Tensor:
        y = torch.ops.qexp.w4a16(x * 2, *weight, None)
        a = (x * 10).round().clamp(-128, 127).to(torch.int8)
        return torch.relu(y) + matmul.w4a8(a, case.a_scale, None, weight, None, torch.float32)

    x = torch.randn(4, 32)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x), layer(x))


def test_every_operator_has_a_reference_and_a_shape() -> None:
    import importlib

    from qexp.kernels import shapes

    for op, module in ops.OPS.items():
        assert hasattr(importlib.import_module(f"qexp.kernels.{module}"), f"{op}_reference")
        assert op == "prepack_w4" or hasattr(shapes, op)


def test_info_says_what_computes() -> None:
    info = ops.kernel_info()
    assert info["compiled"] == build.load() and (info["compiled"] or info["reason"])
    assert info["layouts"] == int4.LAYOUTS and info["threads"] == torch.get_num_threads()
