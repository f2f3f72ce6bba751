"""`objective: seq2seq`: supervised fine-tuning of encoder-decoders. The encoder reads the prompt, the decoder learns
the answer."""

from tunekit.recipe.bases.section import ObjectiveSettings


class Seq2seqSettings(ObjectiveSettings):
    """Settings of supervised fine-tuning of encoder-decoders. `method` is the only setting."""

    summary = "cross entropy on the answers of encoder-decoders"
    supervised = True
    family = "seq2seq"
