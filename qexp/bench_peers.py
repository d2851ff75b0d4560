"""Who else multiplies by 4-bit weights on a CPU, each as its own users would call it.

A peer gets a float32 weight [N, K] and an input [M, K] and returns a call, or is missing with a reason. Preparation
(quantizing, packing, building a session) is not timed; quantizing the activations is part of a peer's call wherever it
is part of its operator. Values are random: peers are compared in time here, not in accuracy.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from qexp import bench_ggml
from qexp.bench_timing import Call

Make = Callable[[], Call]


@dataclass(frozen=True)
class Peer:
    """``prepare(weight, x, group)`` returns how to make calls; ``bytes_per_weight`` is what one call reads."""

    name: str
    bytes_per_weight: float
    prepare: Callable[[Tensor, Tensor, int], Make]
    packages: Sequence[str] = ()

    def missing(self) -> str:
        """Return why the peer cannot be measured here, or nothing."""
        try:
            for package in self.packages:
                importlib.import_module(package)
        except (ImportError, OSError) as error:
            return f"{error}; pip install 'qexp[bench-peers]'"
        return ""


def _float(dtype: torch.dtype) -> Callable[[Tensor, Tensor, int], Make]:
    def prepare(weight: Tensor, x: Tensor, group: int) -> Make:  # noqa: ARG001
        given = x.to(dtype)

        def make() -> Call:
            own = weight.to(dtype, copy=True)
            return lambda: linear(given, own)

        return make

    return prepare


def _int4pack(weight: Tensor, x: Tensor, group: int) -> Make:
    rows, columns = weight.shape
    codes = torch.randint(0, 16, (rows, columns), dtype=torch.int32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    scales = torch.rand(columns // group, rows, 2).bfloat16()
    given = x.bfloat16()

    def make() -> Call:
        own = packed.clone()
        return lambda: torch.ops.aten._weight_int4pack_mm_for_cpu(given, own, group, scales)

    return make


def _w8a8(weight: Tensor, x: Tensor, group: int) -> Make:  # noqa: ARG001
    """torch's dynamically quantized linear layer on oneDNN, per channel."""  # noqa: D403
    torch.backends.quantized.engine = "onednn"
    rows = weight.shape[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        codes = torch.quantize_per_channel(
            weight, torch.full((rows,), 0.02), torch.zeros(rows, dtype=torch.int64), 0, torch.qint8
        )

    def make() -> Call:
        own = torch.ops.quantized.linear_prepack(codes, None)
        return lambda: torch.ops.quantized.linear_dynamic(x, own)

    return make


def _onnxruntime(weight: Tensor, x: Tensor, group: int) -> Make:
    """onnxruntime's MatMulNBits at accuracy level 4: int8 activations, the fast setting."""  # noqa: D403
    ort = importlib.import_module("onnxruntime")
    model, given = _onnx_model(*weight.shape, group), {"A": x.numpy()}
    _share_threads(torch.get_num_threads())
    options = ort.SessionOptions()
    options.use_per_session_threads = False  # threads of one copy's session would spin while the next one works

    def make() -> Call:
        session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        return lambda: session.run(None, given)

    return make


@functools.cache
def _share_threads(count: int) -> None:
    """Give all sessions of this process one pool. It must exist before the first session."""
    importlib.import_module("onnxruntime").set_global_thread_pool_sizes(count, 1)


@functools.cache
def _onnx_model(rows: int, columns: int, group: int) -> bytes:
    """Return a model of one node, Y = A dequantized(B)ᵀ, with random codes."""
    onnx = importlib.import_module("onnx")
    helper, numpy_helper = (importlib.import_module(f"onnx.{name}") for name in ("helper", "numpy_helper"))
    codes = torch.randint(0, 256, (rows, columns // group, group // 2), dtype=torch.uint8)
    scales = torch.rand(rows * (columns // group))
    settings = {"K": columns, "N": rows, "bits": 4, "block_size": group, "accuracy_level": 4}
    node = helper.make_node("MatMulNBits", ["A", "B", "S"], ["Y"], domain="com.microsoft", **settings)

    def matrix(name: str, width: int) -> Any:
        return helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["M", width])

    parts = [numpy_helper.from_array(codes.numpy(), "B"), numpy_helper.from_array(scales.numpy(), "S")]
    graph = helper.make_graph([node], "matmul", [matrix("A", columns)], [matrix("Y", rows)], parts)
    sets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    made: bytes = helper.make_model(graph, opset_imports=sets, ir_version=10).SerializeToString()
    return made


def _ggml(kind: str) -> Callable[[Tensor, Tensor, int], Make]:
    return lambda weight, x, group: lambda: bench_ggml.prepared(kind, weight, x)  # noqa: ARG005 -- ggml has its own


PEERS = (
    Peer("torch fp32", 4, _float(torch.float32)),
    Peer("torch bf16", 2, _float(torch.bfloat16)),
    Peer("torch int4pack", 0.5, _int4pack),
    Peer("oneDNN W8A8", 1, _w8a8),
    Peer("onnxruntime MatMulNBits", 0.5, _onnxruntime, ("onnxruntime", "onnx")),
    Peer("ggml Q4_0", 0.5625, _ggml("Q4_0"), ("ggml",)),
    Peer("ggml Q4_K", 0.5625, _ggml("Q4_K"), ("ggml",)),
)


def available() -> tuple[list[Peer], dict[str, str]]:
    """Return the peers that can be measured here, and why the others cannot."""
    missing = {peer.name: reason for peer in PEERS if (reason := peer.missing())}
    return [peer for peer in PEERS if peer.name not in missing], missing
