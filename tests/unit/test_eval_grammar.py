"""The embedded task's pairs: how many, distinct, balanced, one word apart, always the same."""

from collections import Counter
from hashlib import sha256

from qexp.eval.grammar import IRREGULAR, PER_PHENOMENON, pairs, plural


def test_there_are_six_hundred_distinct_pairs_evenly_spread():
    made = pairs()
    assert Counter(p.phenomenon for p in made) == dict.fromkeys(
        ["subject_verb", "determiner_noun", "anaphor_gender", "anaphor_number"], PER_PHENOMENON
    )
    assert len({(p.good, p.bad) for p in made}) == len(made) == 600


def test_the_two_sentences_differ_in_one_word():
    for pair in pairs():
        good, bad = pair.good.split(), pair.bad.split()
        assert len(good) == len(bad)
        assert sum(a != b for a, b in zip(good, bad, strict=True)) == 1


def test_no_sentence_is_right_in_one_pair_and_wrong_in_another():
    made = pairs()
    assert {p.good for p in made}.isdisjoint(p.bad for p in made)


def test_the_wrong_word_is_not_told_by_its_frequency():
    right, wrong = Counter(), Counter()
    for pair in pairs():
        for good, bad in zip(pair.good.split(), pair.bad.split(), strict=True):
            if good != bad:
                right[good] += 1
                wrong[bad] += 1
    numbers = [("is", "are"), ("himself", "herself"), ("was", "were")]
    assert all(0.3 < right[a] / (right[a] + wrong[a]) < 0.7 for pair in numbers for a in pair)


def test_the_first_forty_mix_all_phenomena():
    assert len(Counter(p.phenomenon for p in pairs()[:40])) == 4


def test_irregular_plurals_are_used():
    assert [plural(noun) for noun in ("lady", "child", "house")] == ["ladies", "children", "houses"]
    assert all(not plural(noun).endswith("ss") for noun in IRREGULAR)


def test_the_list_never_changes_without_a_new_version():
    text = "".join(f"{p.good}|{p.bad}\n" for p in pairs())
    assert sha256(text.encode()).hexdigest()[:16] == "992f3fb7b8305d17"
