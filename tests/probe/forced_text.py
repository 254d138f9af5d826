"""A logit processor for the servers of the tests: some output tokens are given, others excluded."""

from __future__ import annotations

from sglang.srt.sampling.custom_logit_processor import CustomLogitProcessor


class ForcedText(CustomLogitProcessor):
    """From output token `at` on, a request says `ids`; it never says one of `never`."""

    def __call__(self, logits, custom_param_list=None):
        for row, own in zip(logits, custom_param_list, strict=True):
            index = _index(own["__req__"], own)
            given = (
                own["ids"][index - own["at"]] if 0 <= index - own["at"] < len(own["ids"]) else -1
            )
            if given >= 0:
                row[:] = -float("inf")
                row[given] = 0.0
            else:
                row[own["never"]] = -float("inf")
        return logits


def _index(req, own):
    """Number of the output token that is sampled now.

    With overlap a decode step may not know the token before it: steps since the prefill count.
    """
    if req.decode_batch_idx == 0:
        own["prefilled"] = len(req.output_ids)
    return own["prefilled"] + req.decode_batch_idx
