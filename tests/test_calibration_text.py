"""What a model reads to be measured: split, hashed, and refused where it would mislead."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from sglang_tri.errors import KvPolicyError
from sglang_tri.statistics import calibration_text as text

DEFAULT = text.Source(None)


class Bytes:
    """A tokenizer with one token a byte, and BOS where asked for."""

    def __init__(self, bos: int | None = None, adds: bool = True) -> None:
        self.bos_token_id = bos
        self._starts = [bos] if bos is not None and adds else []

    def encode(self, content: str, add_special_tokens: bool = True, **options: Any) -> list[int]:
        return [*(self._starts if add_special_tokens else []), *content.encode()]


class Words(Bytes):
    """One token for each run of blanks or of anything else."""

    def encode(self, content: str, add_special_tokens: bool = True, **options: Any) -> list[int]:
        return [hash(run) % 50_000 for run in re.findall(r"\s+|\S+", content)]


@pytest.fixture
def source(tmp_path: Path) -> text.Source:
    return text.Source(str(tmp_path / "text"))


def sequences(
    source: text.Source, content: str, tokens: int, length: int, tokenizer: Any = None
) -> text.Sequences:
    Path(str(source.path)).write_bytes(content.encode())
    return text.tokenize(source, tokenizer or Bytes(), tokens, length)


def test_the_default_is_long_and_varied() -> None:
    found = text.tokenize(DEFAULT, Bytes(), 100_000, 8192)
    assert found.tokens == 100_000
    assert [len(ids) for ids in found.ids] == [8192] * 12 + [100_000 - 12 * 8192]
    assert bytes(found.ids[0]) == DEFAULT.read().encode()[:8192]


def test_sequences_follow_one_another(source: text.Source) -> None:
    content = DEFAULT.read()[:1000]
    found = sequences(source, content, 900, 128)
    assert bytes(token for ids in found.ids for token in ids) == content.encode()[:900]


def test_long_blanks_do_not_make_a_text_short(source: text.Source) -> None:
    content = (" " * 80).join(str(number) for number in range(2000))
    assert sequences(source, content, 2000, 500, Words()).tokens == 2000


@pytest.mark.parametrize(
    ("tokenizer", "starts"),
    [(Bytes(), False), (Bytes(300), True), (Bytes(300, adds=False), False)],
)
def test_bos_where_the_tokenizer_adds_it(tokenizer: Bytes, starts: bool) -> None:
    found = text.tokenize(DEFAULT, tokenizer, 1000, 128)
    assert found.tokens == 1000
    assert max(map(len, found.ids)) == 128
    assert all((ids[0] == 300) == starts and 300 not in ids[1:] for ids in found.ids)


def test_the_hash_tells_texts_and_splits_apart(source: text.Source) -> None:
    content = DEFAULT.read()
    first = sequences(source, content, 1000, 128).sha256
    others = {
        sequences(source, content, 1000, 129).sha256,
        sequences(source, content, 1001, 128).sha256,
        sequences(source, content[1:], 1000, 128).sha256,
    }
    assert len({first, *others}) == 4
    assert text.tokenize(DEFAULT, Bytes(), 1000, 128).sha256 == first


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("short", "has 5 tokens, less than --kv-calibration-tokens 2000"),
        ("", "has 0 tokens"),
        ("The same line again.\n" * 500, "repeats itself"),
        ("x" * 3000, "repeats itself"),
        ((DEFAULT.read()[:200] + "\n") * 50, "repeats itself"),
    ],
)
def test_degenerate_text(source: text.Source, content: str, said: str) -> None:
    with pytest.raises(KvPolicyError, match=f"--kv-calibration-text {source.path} {said}"):
        sequences(source, content, 2000, 512)


def test_files_that_are_no_text(tmp_path: Path, source: text.Source) -> None:
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe\x00")
    for wrong in (binary, tmp_path / "absent", tmp_path):
        with pytest.raises(KvPolicyError, match=f"--kv-calibration-text {wrong} cannot be read"):
            text.Source(str(wrong)).read()
    Path(str(source.path)).write_text("Grüße", encoding="utf-8")
    assert source.read() == "Grüße"
