"""From plain config to objects: every key and type is checked, and a mistake is one line that names the key."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import pytest

from qexp.core.build import build
from qexp.core.errors import UserError


@runtime_checkable
class Speaker(Protocol):
    def speak(self) -> str: ...


@dataclass(frozen=True, kw_only=True)
class Dog:
    name: str
    legs: int

    def speak(self) -> str:
        return "wow"


@dataclass(frozen=True, kw_only=True)
class Choosy:
    """Refuses an even number."""

    odd: int

    def __post_init__(self) -> None:
        if self.odd % 2 == 0:
            raise UserError(f"odd={self.odd}", "an odd number", "odd=3")


@dataclass(frozen=True, kw_only=True)
class Zoo:
    keeper: Speaker
    animals: Mapping[str, Speaker]
    words: Sequence[str]
    alpha: float | str
    limit: int | None
    open: bool


class NotAMember:
    pass


DOG = {"_target_": f"{__name__}.Dog", "name": "rex", "legs": 4}
ZOO = {
    "_target_": f"{__name__}.Zoo",
    "keeper": DOG,
    "animals": {"b": DOG, "a": {**DOG, "legs": 3}},
    "words": ["x"],
    "alpha": 0.5,
    "limit": None,
    "open": True,
}


def test_members_are_built_inside_out_and_in_order() -> None:
    zoo = build(ZOO, "zoo")
    assert zoo == Zoo(
        keeper=Dog(name="rex", legs=4), animals={"b": Dog(name="rex", legs=4), "a": Dog(name="rex", legs=3)},
        words=["x"], alpha=0.5, limit=None, open=True,
    )  # fmt: skip
    assert list(zoo.animals) == ["b", "a"]


def test_plain_data_stay_plain() -> None:
    assert build({"a": [1, {"b": None}]}) == {"a": [1, {"b": None}]}
    assert build([DOG], "list") == [Dog(name="rex", legs=4)]


@pytest.mark.parametrize(
    ("key", "given", "taken"),
    [("alpha", "auto", "auto"), ("alpha", 1, 1), ("limit", 3, 3), ("open", False, False), ("animals", {}, {})],
)
def test_values_that_fit(key: str, given: Any, taken: Any) -> None:
    assert getattr(build({**ZOO, key: given}, "zoo"), key) == taken


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"legs": 5}, ["zoo.legs is no setting of Zoo", "known: alpha, animals"]),
        ({"limmit": 5}, ["zoo.limmit", "did you mean limit"]),
        ({"limit": "many"}, ["zoo.limit='many'", "integer"]),
        ({"limit": 1.5}, ["zoo.limit=1.5", "integer"]),
        ({"open": "perhaps"}, ["zoo.open='perhaps'", "boolean"]),
        ({"words": "x"}, ["zoo.words=x; need a list; set zoo.words=[x]"]),
        ({"words": [1]}, ["zoo.words=[1]", "string"]),
        ({"keeper": 5}, ["zoo.keeper=5", "Speaker"]),
        ({"keeper": None}, ["zoo.keeper=None", "Speaker"]),
        ({"keeper": {**DOG, "legs": "four"}}, ["zoo.keeper.legs='four'", "integer"]),
        ({"keeper": {"_target_": f"{__name__}.Dog", "name": "rex"}}, ["zoo.keeper lacks legs"]),
        ({"keeper": {**ZOO, "_target_": f"{__name__}.Choosy"}}, ["no setting of Choosy"]),
        ({"keeper": {"_target_": f"{__name__}.Choosy", "odd": 2}}, ["odd=2; need an odd number; set odd=3"]),
        ({"keeper": {"_target_": f"{__name__}.Choosy", "odd": 3}}, ["zoo.keeper", "Speaker"]),
        ({"animals": {"a": {"_target_": f"{__name__}.Choosy", "odd": 3}}}, ["zoo.animals", "Speaker"]),
        ({"keeper": {"_target_": f"{__name__}.NotAMember"}}, ["NotAMember is no dataclass"]),
        ({"keeper": {"_target_": f"{__name__}.Nothing"}}, ["Nothing cannot be imported"]),
        ({"keeper": {"_target_": "no.such.module.Thing"}}, ["no.such.module.Thing cannot be imported"]),
        ({"keeper": {"_target_": ""}}, ["cannot be imported"]),
    ],
)
def test_a_mistake_names_its_key(change: dict[str, Any], said: list[str]) -> None:
    with pytest.raises(UserError) as error:
        build({**ZOO, **change}, "zoo")
    line = str(error.value)
    assert "\n" not in line
    assert [part for part in said if part not in line] == [], line
