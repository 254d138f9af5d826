"""SGLang's scheduler over a model of digests, beside a plain model of every conversation."""
