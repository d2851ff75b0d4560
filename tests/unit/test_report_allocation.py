"""The picture of measured bits: every layer in its place, whatever the family calls it."""

from __future__ import annotations

from qexp.report.allocation import draw, expected, table

BITS = {
    "model.layers.0.self_attn.q_proj": 2,
    "model.layers.0.mlp.down_proj": 4,
    "model.layers.10.self_attn.q_proj": 3,
    "model.decoder.layers.11.fc1": 8,
}
TOLD = {
    "metric": "kl",
    "bits": BITS,
    "told": {"predicted/exact": 0.01234, "predicted/greedy": 0.02, "bits_per_weight/exact": 3},
}


def test_layers_are_found_by_block_and_name() -> None:
    blocks, layers, cells = table(BITS)
    assert blocks == [0, 10, 11] and layers == ["q_proj", "down_proj", "fc1"]
    assert cells[10, "q_proj"] == 3 and cells[11, "fc1"] == 8 and len(cells) == 4


def test_every_number_is_in_the_picture() -> None:
    texts = {text.get_text() for text in draw(TOLD).axes[0].texts}
    assert texts == {"2", "3", "4", "8"}
    assert expected(TOLD) == "damage expected by kl: exact 0.0123, greedy 0.02"
