"""What a model reads to be measured: split, hashed, and refused where it would mislead."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sglang_tri.calibration import text
from sglang_tri.errors import KvPolicyError


class Bytes:
    """A tokenizer with one token a byte, and BOS where asked for."""

    def __init__(self, bos: int | None = None, adds: bool = True) -> None:
        self.bos_token_id = bos
        self._starts = [bos] if bos is not None and adds else []

    def encode(self, content: str, add_special_tokens: bool = True, **options: Any) -> list[int]:
        return [*(self._starts if add_special_tokens else []), *content.encode()]


def sequences(content: str, tokens: int, length: int, tokenizer: Any = None) -> text.Sequences:
    return text.tokenize(content, tokenizer or Bytes(), tokens, length, "--kv-calibration-text x")


def test_the_default_is_long_and_varied() -> None:
    found = sequences(text.read(None), 100_000, 8192)
    assert found.tokens == 100_000
    assert [len(ids) for ids in found.ids] == [8192] * 12 + [100_000 - 12 * 8192]
    assert bytes(found.ids[0]) == text.read(None).encode()[:8192]


def test_sequences_follow_one_another() -> None:
    content = text.read(None)[:1000]
    found = sequences(content, 900, 128)
    assert bytes(token for ids in found.ids for token in ids) == content.encode()[:900]


@pytest.mark.parametrize(
    ("tokenizer", "starts"),
    [(Bytes(), False), (Bytes(300), True), (Bytes(300, adds=False), False)],
)
def test_bos_where_the_tokenizer_adds_it(tokenizer: Bytes, starts: bool) -> None:
    found = sequences(text.read(None), 1000, 128, tokenizer)
    assert found.tokens == 1000
    assert max(map(len, found.ids)) == 128
    assert all((ids[0] == 300) == starts and 300 not in ids[1:] for ids in found.ids)


def test_the_hash_tells_texts_and_splits_apart() -> None:
    content = text.read(None)
    hashes = {
        sequences(content, 1000, 128).sha256,
        sequences(content, 1000, 129).sha256,
        sequences(content, 1001, 128).sha256,
        sequences(content[1:], 1000, 128).sha256,
    }
    assert len(hashes) == 4
    assert sequences(content, 1000, 128).sha256 in hashes


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("short", "has 5 tokens, less than --kv-calibration-tokens 2000"),
        ("", "has 0 tokens"),
        ("The same line again.\n" * 500, "repeats itself"),
        ("x" * 3000, "repeats itself"),
        ((text.read(None)[:200] + "\n") * 50, "repeats itself"),
    ],
)
def test_degenerate_text(content: str, said: str) -> None:
    with pytest.raises(KvPolicyError, match=f"--kv-calibration-text x .*{said}|{said}"):
        sequences(content, 2000, 512)


def test_files_that_are_no_text(tmp_path: Path) -> None:
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe\x00")
    for wrong in (binary, tmp_path / "absent", tmp_path):
        with pytest.raises(KvPolicyError, match=f"--kv-calibration-text {wrong} cannot be read"):
            text.read(str(wrong))
    good = tmp_path / "good"
    good.write_text("Grüße", encoding="utf-8")
    assert text.read(str(good)) == "Grüße"
