"""SGLang on a machine without an accelerator, through plain torch."""
