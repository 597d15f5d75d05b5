"""The journal: judgements on disk, whole or torn, of this search or of another."""

import math

import pytest

from widthkit.errors import CheckpointError, OptionError
from widthkit.search.journal import Journal
from widthkit.search.judging import Judgement

ENTRIES = {
    "a": Judgement(-0.1 - 1e-17, 1 / 3, None),
    "b": Judgement(-2.0, 2.0, 0.125),
    "c": Judgement(math.nan, math.nan, 0.0),
    "d": Judgement(-math.inf, math.inf, None),
}


@pytest.fixture
def path(tmp_path):
    journal = Journal(tmp_path / "new" / "journal.jsonl", "me")
    for key, judgement in ENTRIES.items():
        journal.add(key, judgement)
    return journal.path


def test_a_journal_gives_back_what_it_got_to_the_last_bit(path):
    assert repr(Journal(path, "me").read()) == repr(ENTRIES)


def test_lines_are_appended_and_old_ones_never_touched(path):
    before = path.read_bytes()
    journal = Journal(path, "me")
    journal.read()
    journal.add("e", Judgement(-1.0, 1.0, None))
    assert path.read_bytes().startswith(before)
    assert len(path.read_bytes()) - len(before) < 80
    assert [*Journal(path, "me").read()] == [*ENTRIES, "e"]


def test_a_journal_torn_at_any_byte_keeps_its_whole_lines_and_goes_on(path):
    data = path.read_bytes()
    for cut in range(len(data)):
        path.write_bytes(data[:cut])
        journal = Journal(path, "me")
        known = journal.read()
        whole = max(0, data[:cut].count(b"\n") - 1)
        assert repr(known) == repr(dict(list(ENTRIES.items())[:whole]))
        for key in list(ENTRIES)[whole:]:
            journal.add(key, ENTRIES[key])
        assert path.read_bytes() == data


def test_a_torn_line_longer_than_what_follows_leaves_nothing_behind(path):
    path.write_bytes(path.read_bytes() + b'{"widths": "' + b"x" * 500)
    journal = Journal(path, "me")
    assert list(journal.read()) == list(ENTRIES)
    journal.add("e", Judgement(-1.0, 1.0, None))
    assert list(Journal(path, "me").read()) == [*ENTRIES, "e"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda lines: [lines[0], b"{", *lines[2:]],
        lambda lines: [lines[0], b"\x00" * 20, *lines[2:]],
        lambda lines: [lines[0], b"\xff\xfe", *lines[2:]],
        lambda lines: [lines[0], b'{"widths": "a"}', *lines[2:]],
        lambda lines: [lines[0], b"[]", *lines[2:]],
        lambda lines: [lines[0], b'{"widths": "a", "score": "x", "loss": 1, "accuracy": null}', *lines[2:]],
        lambda lines: lines[1:],
        lambda lines: [b"[]", *lines[1:]],
        lambda lines: [b"3", *lines[1:]],
    ],
)
def test_a_damaged_journal_is_refused(path, damage):
    path.write_bytes(b"\n".join(damage(path.read_bytes().splitlines())) + b"\n")
    with pytest.raises(CheckpointError, match=r"journal\.jsonl is damaged .*; delete it to search from the start"):
        Journal(path, "me").read()


def test_a_journal_of_someone_else_is_refused(path):
    with pytest.raises(CheckpointError, match="belongs to another search"):
        Journal(path, "you").read()


def test_a_journal_without_a_path_keeps_nothing():
    journal = Journal(None, "me")
    journal.add("a", ENTRIES["a"])
    assert journal.read() == {}


def test_a_journal_that_cannot_be_written_says_so(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OptionError, match="cannot write"):
        Journal(tmp_path / "file" / "journal.jsonl", "me").add("a", ENTRIES["a"])
