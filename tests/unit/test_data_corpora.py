"""Text by name: file kinds, split choice, rows, and what a user reads when something is missing."""

import gzip
import json

import pyarrow as pa
import pytest
from pyarrow import parquet

from qexp.core import hub
from qexp.core.errors import UserError
from qexp.data import corpora
from qexp.data.corpora import Source


def source(corpus, path, split="test"):
    return Source(corpus=corpus, split=split, path=None if path is None else str(path), key="eval.x.path")


@pytest.fixture
def no_hub(monkeypatch):
    monkeypatch.setattr(hub, "hub_answers", lambda endpoint: False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)


def test_a_local_text_file_is_taken_as_it_is(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\n two \n")
    assert source("local", tmp_path / "a.txt").text("\n\n") == "one\n\n two \n"


@pytest.mark.parametrize("name", ["a.jsonl", "a.json.gz", "a.parquet"])
def test_tables_give_their_text_column(tmp_path, name):
    rows, file = ["first", "second"], tmp_path / name
    lines = "".join(json.dumps({"text": row, "url": "u"}) + "\n" for row in rows).encode()
    if name.endswith("parquet"):
        parquet.write_table(pa.table({"url": ["u", "u"], "text": rows}), file)
    else:
        file.write_bytes(gzip.compress(lines) if name.endswith("gz") else lines)
    assert list(source("local", file).documents()) == rows


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_a_table_without_text_names_its_columns(tmp_path, name):
    if name.endswith("parquet"):
        parquet.write_table(pa.table({"body": ["x"], "url": ["u"]}), tmp_path / name)
    else:
        (tmp_path / name).write_text('{"body": "x", "url": "u"}\n')
    with pytest.raises(UserError, match=r"columns body, url; need a column 'text'"):
        source("local", tmp_path / name).documents()


def test_wikitext_rows_are_the_hubs_rows(tmp_path):
    (tmp_path / "wiki.test.raw").write_text(" \n = Robert = \n \n Text . \n")
    assert source("wikitext2", tmp_path).documents() == ["", " = Robert = \n", "", " Text . \n"]


@pytest.mark.parametrize(("row", "warned"), [("the <unk> word", True), ("the rare word", False)])
def test_the_edition_that_is_not_raw_is_told(tmp_path, caplog, row, warned):
    (tmp_path / "test.txt").write_text(row)
    source("wikitext2", tmp_path).documents()
    assert ("not the raw one" in caplog.text) is warned


def test_ptb_takes_the_sentence_column(tmp_path):
    (tmp_path / "ptb.test.jsonl").write_text('{"sentence": "no it was"}\n{"sentence": "a <unk> N"}\n')
    assert source("ptb", tmp_path).text(" ") == "no it was a <unk> N"


def test_a_folder_gives_the_files_of_the_split(tmp_path):
    for name in ("train.txt", "valid.txt", "test.txt", "latest.txt"):
        (tmp_path / name).write_text(name)
    names = {split: [f.name for f in source("ptb", tmp_path, split).files()] for split in corpora.SPLIT_WORDS}
    assert names == {"train": ["train.txt"], "validation": ["valid.txt"], "test": ["test.txt"]}


def test_a_copy_of_the_hub_folder_gives_the_right_configuration(tmp_path):
    for config in ("wikitext-2-raw-v1", "wikitext-103-raw-v1"):
        (tmp_path / config).mkdir()
        parquet.write_table(pa.table({"text": [config]}), tmp_path / config / "test-00000-of-00001.parquet")
    assert source("wikitext2", tmp_path).documents() == ["wikitext-2-raw-v1"]


def test_c4_takes_the_papers_shard_of_a_complete_copy(tmp_path):
    (tmp_path / "en").mkdir()
    for shard in ("00000", "00001"):
        lines = gzip.compress(f'{{"text": "{shard}"}}\n'.encode())
        (tmp_path / "en" / f"c4-validation.{shard}-of-00008.json.gz").write_bytes(lines)
    assert source("c4", tmp_path, "validation").documents() == ["00000"]


def test_a_missing_split_lists_what_is_there(tmp_path):
    (tmp_path / "test.txt").write_text("x")
    with pytest.raises(UserError, match=r"has test\.txt; need a train split; set eval\.x\.path="):
        source("wikitext2", tmp_path, "train").check()


@pytest.mark.parametrize("content", ["", " \n\n"])
def test_empty_text_is_an_error(tmp_path, content):
    (tmp_path / "a.txt").write_text(content)
    with pytest.raises(UserError, match="holds no text"):
        source("local", tmp_path / "a.txt").documents()


def test_a_wrong_path_is_an_error(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        source("c4", tmp_path / "nowhere").check()


def test_an_unknown_kind_of_file_lists_the_known(tmp_path):
    (tmp_path / "a.pdf").write_text("x")
    with pytest.raises(UserError, match=r"a\.pdf is not a known kind of file; need one of \.txt"):
        source("local", tmp_path / "a.pdf").documents()


@pytest.mark.parametrize("corpus", ["local", "ptb"])
def test_corpora_without_a_hub_need_a_path(corpus):
    with pytest.raises(UserError, match=r"without a path.*set eval\.x\.path="):
        source(corpus, None).check()


def test_without_the_hub_the_message_says_what_to_type(no_hub):
    with pytest.raises(UserError, match=r"does not answer; need the hub.*set eval\.x\.path=<folder"):
        source("wikitext2", None).check()


def test_offline_mode_trusts_the_cache(no_hub, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    source("wikitext2", None).check()


def test_the_probe_gives_up_on_a_closed_port():
    hub.hub_answers.cache_clear()
    assert not hub.hub_answers("http://127.0.0.1:9")


def test_identity_follows_content_and_not_the_place(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.txt").write_text("same")
    one, two = (source("local", tmp_path / folder / "x.txt") for folder in ("a", "b"))
    assert one.identity() == two.identity()
    assert str(tmp_path) not in json.dumps(one.identity())
    (tmp_path / "b" / "x.txt").write_text("other")
    assert one.identity() != two.identity()
