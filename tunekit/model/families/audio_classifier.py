"""Audio classifiers: Whisper's encoder with one row of logits per recording."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from tunekit.contracts import Processor, Tensors
from tunekit.errors import ModelError
from tunekit.model.families.family import Family
from tunekit.model.families.heads import TextHead
from tunekit.model.families.structure import noise_features
from tunekit.model.speech.features import AudioProcessor, load_extractor
from tunekit.model.storage.inspection import read_config
from tunekit.model.storage.source import find_source
from tunekit.recipe.model import ModelSection

PROJECTOR, CLASSIFIER = "projector", "classifier"
MODEL_TYPES = ("whisper",)
NOT_WHISPER = (
    "it is not a Whisper model. audio_classify trains only Whisper's encoder, which reads log-mel features. Models "
    "that read raw waveforms (Wav2Vec2, HuBERT, WavLM) or other spectrograms (AST) are not supported"
)
MIXED = "its head mixes all layers with trained weights (use_weighted_layer_sum), which audio_classify does not train"


@dataclass(frozen=True)
class MeanHead(TextHead):
    """logits = classifier(projector(m)), where m is the mean of a recording's hidden states. The model's own forward
    first projects each position and then averages, which gives the same logits.

    Shapes: m (N, D) -> (N, C).
    """

    def logits(self, hidden: Tensor) -> Tensor:
        """(N, D) -> (N, C) in float32."""
        return super().logits(self.net.get_submodule(PROJECTOR)(hidden))


class AudioClassifierFamily(Family):
    """Input: log-mel features, input_features (B, M, F). The encoder computes hidden states (B, T, D). A head maps the
    mean over T to the logits of C labels: (B, D) -> (B, C)."""

    endings = ("ForAudioClassification",)
    class_name = "AutoModelForAudioClassification"
    text = "an audio classifier"
    answers = False
    labelled = True
    reads_ids = False
    ids = None
    head_parts = (PROJECTOR, CLASSIFIER)
    unread = ("model.decoder.", "proj_out.")  # tensors of a base that was saved as a transcription model

    def obstacle(self, config: Mapping[str, object]) -> str | None:
        if config.get("model_type") not in MODEL_TYPES:
            return NOT_WHISPER
        return MIXED if config.get("use_weighted_layer_sum") else None

    def processor(self, section: ModelSection) -> Processor:
        """The base's feature extractor. Raises: ModelError for a base that cannot label recordings."""
        source = find_source(section, weights=False)
        config = {} if source.gguf_file is not None else read_config(source)
        why = self.obstacle(config) if config else None
        if why is not None:
            what = f"{section.name_or_path} ({config.get('model_type', 'unknown')}) cannot be loaded: {why}"
            raise ModelError(what, "choose a Whisper model, such as openai/whisper-tiny", key="model.name_or_path")
        return AudioProcessor(*load_extractor(section))

    def trained_with(self, net: nn.Module) -> list[str]:
        """Both parts of the head."""
        return list(self.head_parts)

    def head_name(self, net: nn.Module) -> str | None:
        return CLASSIFIER

    def head(self, net: nn.Module) -> TextHead:
        return MeanHead(net, CLASSIFIER)

    def trial_inputs(self, net: nn.Module) -> Tensors:
        return {"input_features": noise_features(net)}


FAMILY = AudioClassifierFamily()
