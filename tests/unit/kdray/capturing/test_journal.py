"""What a journal gives back after a kill at any byte."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdray.capturing.journal import Journal
from kdray.errors import DataError

SCHEMA = pa.schema([pa.field("number", pa.int64()), pa.field("halves", pa.list_(pa.float16()))])


def rows(*numbers: int) -> pa.Table:
    return pa.table({"number": numbers, "halves": [[number / 2] * (number % 3) for number in numbers]}, schema=SCHEMA)


def numbers(journal: Journal) -> list[int]:
    return [number for batch in journal.batches for number in batch.column("number").to_pylist()]


def written(path: Path) -> list[int]:
    """A journal of three appends; where each of its frames ends."""
    journal = Journal(path, SCHEMA)
    ends = [path.stat().st_size]
    for part in ((1, 2), (3,), (4, 5, 6)):
        journal.append(rows(*part))
        ends.append(path.stat().st_size)
    # Not closed: so a killed process leaves it.
    return ends


def test_a_journal_cut_at_any_byte_holds_the_appends_before_it_and_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    ends = written(path)
    whole = path.read_bytes()
    assert ends[-1] == len(whole)
    for length in range(len(whole) + 1):
        path.write_bytes(whole[:length])
        journal = Journal(path, SCHEMA)
        kept = sum(end <= length for end in ends[1:])
        assert numbers(journal) == [1, 2, 3, 4, 5, 6][: (0, 2, 3, 6)[kept]]
        assert journal.torn_bytes == length - max([0, *(end for end in ends if end <= length)])
        journal.append(rows(7))
        journal.close()
        again = Journal(path, SCHEMA)
        assert numbers(again) == [*range(1, (0, 2, 3, 6)[kept] + 1), 7]
        assert again.torn_bytes == 0
        again.close()


@settings(max_examples=200)
@given(st.data())
def test_a_damaged_byte_ends_it_there_and_is_never_read_as_rows(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "journal")
        ends = written(path)
        content = bytearray(path.read_bytes())
        place = data.draw(st.integers(ends[0], len(content) - 1))
        content[place] ^= data.draw(st.integers(1, 255))
        path.write_bytes(content)
        journal = Journal(path, SCHEMA)
        kept = sum(end <= place for end in ends[1:])
        assert numbers(journal) == [1, 2, 3, 4, 5, 6][: (0, 2, 3, 6)[kept]]
        journal.close()


def test_zeros_that_a_file_system_leaves_are_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    written(path)
    path.write_bytes(path.read_bytes() + bytes(4096))
    journal = Journal(path, SCHEMA)
    assert numbers(journal) == [1, 2, 3, 4, 5, 6]
    assert journal.torn_bytes == 4096
    journal.close()


def test_values_come_back_and_a_cleared_journal_is_empty(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    written(path)
    journal = Journal(path, SCHEMA)
    assert pa.Table.from_batches(journal.batches, SCHEMA).equals(rows(1, 2, 3, 4, 5, 6))
    assert journal.num_rows == 6
    journal.clear()
    assert journal.num_rows == journal.num_bytes == 0
    journal.append(rows(9))
    journal.close()
    again = Journal(path, SCHEMA)
    assert numbers(again) == [9]
    again.close()


def test_rows_of_another_version_are_not_thrown_away(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    written(path)
    before = path.read_bytes()
    with pytest.raises(DataError, match="holds rows of another version of kdray"):
        Journal(path, SCHEMA.append(pa.field("more", pa.int8())))
    assert path.read_bytes() == before
