"""`objective: seq2seq` supervised fine-tuning of encoder-decoders: one reads the prompt, one learns the answer."""

from tunekit.recipe.bases.section import ObjectiveSettings


class Seq2seqSettings(ObjectiveSettings):
    """No settings of its own."""

    summary = "cross entropy on the answers of encoder-decoders"
    supervised = True
    family = "seq2seq"
