"""A decoder as the engine sees it: blocks, layers by role, groups that share an input, and sites.

The model stays a transformers model. A known family (``families.py``) has sites, where transforms insert maps;
any other architecture gets the generic view: every linear of its blocks, each with an input of its own, in the order
in which a forward reaches them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qexp.core.errors import UserError
from qexp.core.linear import QuantLinear, replace_linears
from qexp.core.norms import NORM, OFFSET_NORM, bias_of, gain_of
from qexp.core.words import Group, Layer, Site
from qexp.models import attention
from qexp.models.families import Family, family_of
from qexp.models.replay import Replays
from qexp.models.sites import READERS, block_sites, model_site

log = logging.getLogger(__name__)

DOOR = "door"


class ModelView:
    """A causal LM with its linears replaced by ``QuantLinear``: same numbers, ready to be rewritten."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.config: Any = model.config.get_text_config()
        self.family = family_of(self.config)
        self.stored_parameters = sum(p.numel() for p in model.parameters())  # of the float model: tied ones once
        self.prefix = self.family.blocks if self.family else _largest_module_list(model)
        self.blocks: list[nn.Module] = list(model.get_submodule(self.prefix).children())
        self.has_door = attention.install(model)
        self.replays = Replays(model)
        self.allocation: dict[str, Any] = {}  # bits by layer and how they came about, where they are measured
        self.fisher: dict[str, Tensor] = {}  # mean squared gradients of the loss by layer, where a member needs them
        turns = {} if self.family else _forward_order(model)
        self._groups = [self._find_groups(i, turns) for i in range(len(self.blocks))]
        self.layers = [layer for block in range(len(self.blocks)) for layer in self.layers_of(block)]
        if not self.layers:
            raise UserError(
                f"no linear layers in the blocks of a {self.config.model_type}", "nn.Linear layers to quantize"
            )
        replace_linears(model, [tuple(layer.name for layer in g.layers) for gs in self._groups for g in gs])
        for block in range(len(self.blocks) if self.has_door and self.family else 0):
            self._open(block)

    def _open(self, block: int) -> None:
        """Give the attention of a block its door, and the keys before RoPE the hook that looks at it."""
        family, door = self.described, attention.Door()
        module = self.model.get_submodule(self.path(block, family.attention))
        setattr(module, DOOR, door)
        keys = getattr(module, family.key_norm, None) or self.linear(self.path(block, family.linears["k"]))
        keys.register_forward_hook(attention.EarlyKeys(door, self.head_size))

    @property
    def described(self) -> Family:
        """Return the family. Raises: UserError for an architecture whose sites are not described."""
        if self.family is None:
            raise UserError(
                f"a transform on {self.config.model_type}, whose sites are not described",
                "one of llama, mistral, qwen2, qwen3, gemma, gemma2, gemma3, opt, or a method without transforms",
                "method/transform=[]",
            )
        return self.family

    def capped(self, logits: Tensor) -> Tensor:
        """Return logits as the model caps them, if it does (Gemma 2)."""
        cap = getattr(self.config, "final_logit_softcapping", None)
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def fisher_of(self, name: str) -> Tensor:
        """Return the mean squared gradients [O, I] of a layer's weight, float32."""
        assert name in self.fisher, f"squared gradients of {name}, which nobody has taken"
        return self.fisher[name].to(self.model.device, torch.float32)

    @property
    def head_size(self) -> int:
        """Return the width of one attention head, as the config says it or as hidden / heads."""
        explicit = getattr(self.config, "head_dim", None)
        return int(explicit or self.config.hidden_size // self.config.num_attention_heads)

    @property
    def kv_heads(self) -> int:
        """Return the number of key/value heads."""
        return int(getattr(self.config, "num_key_value_heads", None) or self.config.num_attention_heads)

    def path(self, block: int, name: str) -> str:
        """Return the full module name of ``name`` inside a block."""
        return f"{self.prefix}.{block}.{name}"

    def linear(self, name: str) -> QuantLinear:
        """Return the quantizable layer of this name."""
        module = self.model.get_submodule(name)
        assert isinstance(module, QuantLinear)
        return module

    def door(self, block: int) -> attention.Door | None:
        """Return the attention door of a block, or None where the architecture has none."""
        if self.family is None or not self.has_door:
            return None
        door = getattr(self.model.get_submodule(self.path(block, self.family.attention)), DOOR)
        assert isinstance(door, attention.Door)
        return door

    def groups(self, block: int) -> list[Group]:
        """Return the groups of layers that share an input, in forward order."""
        return self._groups[block]

    def layers_of(self, block: int) -> list[Layer]:
        """Return the layers of a block, in forward order."""
        return [layer for group in self._groups[block] for layer in group.layers]

    def finish(self, group: Group) -> None:
        """Let the layers of a solved group (with those of o, the whole attention) answer from memory from now on.

        Not in the generic view: a layer that was found behind this one may yet feed it.
        """
        if self.family is None:
            return
        block, kind = group.site.split(".", 1)
        names = [layer.name for layer in group.layers]
        if kind == "attn_out":
            names = [self.path(int(block), self.family.attention)]
        for name in names:
            self.replays.finish(name)

    def _find_groups(self, block: int, turns: dict[str, int]) -> list[Group]:
        shapes = {n: m for n, m in self.blocks[block].named_modules() if isinstance(m, nn.Linear)}
        if self.family is None:
            names = sorted(shapes, key=lambda name: turns.get(self.path(block, name), len(turns)))
            found = [(name, [(name.rsplit(".", 1)[-1], name)]) for name in names]
        else:
            linears = self.family.linears
            found = [(site, [(r, linears[r]) for r in roles if r in linears]) for site, roles in READERS.items()]
        return [
            Group(
                site=f"{block}.{site}",
                layers=tuple(
                    Layer(self.path(block, name), role, block, shapes[name].out_features, shapes[name].in_features)
                    for role, name in members
                ),
            )
            for site, members in found
        ]

    def sites(self, *kinds: str) -> list[Site]:
        """Return the sites of these kinds in forward order: residual and head_in first, then block by block."""
        sites = [model_site(self, kind) for kind in kinds if kind in ("residual", "head_in")]
        inner = [kind for kind in kinds if kind not in ("residual", "head_in")]
        blocks = range(len(self.blocks))
        return sites + [site for block in blocks for kind in inner for site in block_sites(self, block, kind)]

    @torch.no_grad()
    def untie(self) -> None:
        """Give the output head a weight of its own, so that folding into it does not reach the embedding."""
        head: Any = self.model.get_output_embeddings()
        embedding: Any = self.model.get_input_embeddings()
        if head is not None and head.weight is embedding.weight:
            head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
            self.config.tie_word_embeddings = self.model.config.tie_word_embeddings = False
            log.info("embedding and output head untied: rewrites reach them separately")

    def gain(self, site: Site) -> Tensor | None:
        """Return the gain [I] of the norm that writes ``site``, float64, or None."""
        writer = next((w for w in site.writers if w.kind in (NORM, OFFSET_NORM)), None)
        return None if writer is None else gain_of(self.model.get_submodule(writer.name), writer.kind)

    def bias(self, site: Site) -> Tensor | None:
        """Return the bias [I] of the norm that writes ``site``, float64, or None."""
        writer = next((w for w in site.writers if w.kind in (NORM, OFFSET_NORM)), None)
        return None if writer is None else bias_of(self.model.get_submodule(writer.name))


@torch.no_grad()
def _forward_order(model: PreTrainedModel) -> dict[str, int]:
    """Return the turn of each linear's first call in a forward over two tokens; experts it does not choose lack one."""
    turns: dict[str, int] = {}

    def takes_turn(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            turns.setdefault(name, len(turns))

        return hook

    linears = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    handles = [module.register_forward_pre_hook(takes_turn(name)) for name, module in linears]
    try:
        model(torch.zeros(1, 2, dtype=torch.long, device=model.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return turns


def _largest_module_list(model: nn.Module) -> str:
    """Return the name of the module list with most linear parameters: the decoder blocks of any architecture."""
    sizes: dict[str, int] = {
        name: sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
    }
    if not sizes or not max(sizes.values()):
        raise UserError("a model without decoder blocks of linear layers", "a causal LM")
    return max(sizes, key=lambda name: sizes[name])
