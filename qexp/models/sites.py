"""The sites of a described decoder: edges between writers and readers where maps can be inserted."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qexp.core.words import Site, Writer

if TYPE_CHECKING:
    from qexp.models.view import ModelView

READERS = {"attn_in": ("q", "k", "v"), "attn_out": ("o",), "mlp_in": ("gate", "up"), "mlp_mid": ("down",)}


def block_sites(view: ModelView, block: int, kind: str) -> list[Site]:
    """Return the sites of one kind in a block: one, or an output for each of its linears."""
    if kind != "output":
        return [_block_site(view, block, kind)]
    return [
        Site(
            f"{block}.{layer.role}.output", kind, block, layer.outputs,
            (Writer(layer.name, "linear"),), (), frozenset({"orthogonal"}),
        )
        for layer in view.layers_of(block)
    ]  # fmt: skip


def model_site(view: ModelView, kind: str) -> Site:
    """Return the residual stream, or the input of the head."""
    family, blocks = view.described, range(len(view.blocks))
    final = Writer(family.final_norm, family.norm_kind)
    if kind == "head_in":
        size = view.config.hidden_size
        return Site("head_in", kind, None, size, (final,), (family.head,), frozenset({"diagonal"}))
    outputs = [view.path(b, family.linears[r]) for b in blocks for r in ("o", "down")]
    readers = [
        view.path(b, family.linears[r]) for b in blocks for r in ("q", "k", "v", "gate", "up") if r in family.linears
    ]
    norms = [
        Writer(view.path(b, n), family.norm_kind) for b in blocks for n in (family.attention_norm, family.mlp_norm)
    ]
    writers = [Writer(e, "embedding") for e in family.embeddings] + [Writer(o, "linear") for o in outputs]
    admits = (
        frozenset() if family.post_norms else frozenset({"orthogonal"} | ({"center"} if family.layer_norm else set()))
    )
    return Site(
        "residual", kind, None, view.config.hidden_size, tuple(writers), (*readers, family.head), admits,
        norms=(*norms, final),
    )  # fmt: skip


def _block_site(view: ModelView, block: int, kind: str) -> Site:
    family, d = view.described, view.head_size

    def named(*roles: str) -> tuple[str, ...]:
        return tuple(view.path(block, family.linears[r]) for r in roles if r in family.linears)

    name, heads = f"{block}.{kind}", view.config.num_attention_heads
    if kind in ("attn_in", "mlp_in"):
        norm = family.attention_norm if kind == "attn_in" else family.mlp_norm
        writers = (Writer(view.path(block, norm), family.norm_kind),)
        readers = named(*READERS[kind])
        return Site(name, kind, block, view.config.hidden_size, writers, readers, frozenset({"diagonal"}))
    if kind == "value":
        admits = {"per_head"} | ({"diagonal"} if heads == view.kv_heads else set())
        writers = (Writer(named("v")[0], "linear"),)
        return Site(name, kind, block, view.kv_heads * d, writers, named("o"), frozenset(admits), head_size=d)
    if kind == "mlp_mid":
        admits = {"diagonal"} if family.scalable_middle else set()
        writers = (Writer(named("up")[0], "linear"),)
        return Site(
            name, kind, block, view.linear(named("down")[0]).in_features, writers, named("down"), frozenset(admits)
        )
    if kind == "attn_out":
        return Site(name, kind, block, heads * d, (), named("o"), frozenset(), head_size=d)
    if kind == "keys":
        return _keys(view, block)
    assert kind == "query_key"
    return Site(name, kind, block, d, (), (view.path(block, family.attention),), frozenset(), head_size=d)


def _keys(view: ModelView, block: int) -> Site:
    """Return the keys as queries meet them, written by their linear, or by the norm behind it, shared by all heads."""
    family, d = view.described, view.head_size
    attention = view.path(block, family.attention)
    normed = getattr(view.model.get_submodule(attention), family.key_norm, None) is not None
    writer = Writer(f"{attention}.{family.key_norm}", family.norm_kind) if normed else Writer(
        view.path(block, family.linears["k"]), "linear"
    )  # fmt: skip
    reader = f"{attention}.{family.query_norm}" if normed else view.path(block, family.linears["q"])
    size = d if normed else view.kv_heads * d
    admits = {"rotary_diagonal"} | (set() if normed else {"rotary"}) | (set() if family.rotary else {"per_head"})
    return Site(f"{block}.keys", "keys", block, size, (writer,), (reader,), frozenset(admits), head_size=d)
