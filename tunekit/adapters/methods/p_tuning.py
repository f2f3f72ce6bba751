"""P-tuning, for any network with a token embedding."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from tunekit.adapters.base import PeftConfig, Slot, Slots
from tunekit.adapters.blocks import virtual_tokens as prompts
from tunekit.adapters.folder.fields import ANY, PeftSide
from tunekit.adapters.method import Method
from tunekit.contracts import Tensors
from tunekit.recipe.adapters.p_tuning import MLP_LAYERS, PTuningSettings

GATES = 4  # gates of an LSTM cell


class PTuning(prompts.VirtualTokens[PTuningSettings]):
    """P-tuning: P = head(E), where the head is an MLP, or an MLP over a bidirectional LSTM that reads the rows of E.

    Shapes: E (P, D) -> (P, D); hidden width H. Folders contain only P. Source: Liu et al. 2021, eq. 3.
    """

    table: nn.Parameter

    @classmethod
    def slots(cls, settings: PTuningSettings, net: nn.Module) -> Slots:
        width, table = prompts.width_of(net), cls.vector_count(settings)
        hidden = settings.encoder_hidden_size or width
        lstm = settings.encoder_reparameterization_type == "LSTM"
        sizes = [2 * hidden, 2 * hidden, width] if lstm else [width, hidden, hidden, width]
        shapes = {"table": ("embedding.weight", (table, width)), **(_lstm(settings, width, hidden) if lstm else {})}
        for number, (inputs, outputs) in enumerate(pairwise(sizes)):
            place = f"mlp_head.{2 * number}"  # with ReLUs between
            shapes[f"weight_{number}"] = (f"{place}.weight", (outputs, inputs))
            shapes[f"bias_{number}"] = (f"{place}.bias", (outputs,))
        return {
            name: Slot(suffix, shape, decays=len(shape) > 1 and name != "table")
            for name, (suffix, shape) in shapes.items()
        }

    def initialise(self, generator: Generator) -> None:
        """Initialise like torch's Embedding, LSTM and Linear layers."""
        nn.init.normal_(self.table, generator=generator)
        hidden = self.settings.encoder_hidden_size or prompts.width_of(self.net)
        for name in self.declared:
            tensor, bound = getattr(self, name), hidden**-0.5
            if name.startswith(("weight_", "bias_")):
                bound = float(getattr(self, f"weight_{name.rpartition('_')[2]}").shape[1]) ** -0.5
            if name != "table":
                nn.init.uniform_(tensor, -bound, bound, generator=generator)

    def vectors(self, tasks: Tensor | None) -> Tensor:
        return self._encode(self.settings.encoder_dropout if self.net.training else 0.0)

    def _encode(self, dropout: float) -> Tensor:
        """The vectors (P, D) that the encoder computes."""
        if self.from_folder:
            return self.prompt
        rows: Tensor = self.table
        recurrent = [getattr(self, name) for name in self.declared if name.startswith("lstm_")]
        if recurrent:
            layers, drops = self.settings.encoder_num_layers, dropout > 0
            start = rows.new_zeros(2 * layers, 1, recurrent[1].shape[1])
            output = torch.lstm(rows[None], (start, start), recurrent, True, layers, dropout, drops, True, True)
            rows = output[0][0]  # (P, 2 H)
        last = max(int(name.rpartition("_")[2]) for name in self.declared if name.startswith("weight_"))
        for number in range(last + 1):
            rows = F.linear(rows, getattr(self, f"weight_{number}"), getattr(self, f"bias_{number}"))
            rows = rows if number == last else F.relu(rows)
        return rows

    def file_tensors(self) -> Tensors:
        """The prompt vectors, computed without dropout even in training mode."""
        return {prompts.IN_FILES: self._encode(0.0).detach()}

    def file_fields(self) -> PeftConfig:
        names = ("encoder_reparameterization_type", "encoder_num_layers", "encoder_dropout")
        encoder = {name: getattr(self.settings, name) for name in names}
        hidden = self.settings.encoder_hidden_size or prompts.width_of(self.net)
        return {**super().file_fields(), **encoder, "encoder_hidden_size": hidden}


def _lstm(settings: PTuningSettings, width: int, hidden: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The names and shapes of a bidirectional LSTM's parameters, in torch's order."""
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {}
    for layer in range(settings.encoder_num_layers):
        for direction, ending in enumerate(("", "_reverse")):
            inputs = width if layer == 0 else 2 * hidden
            for kind, shape in (
                ("weight_ih", (GATES * hidden, inputs)),
                ("weight_hh", (GATES * hidden, hidden)),
                ("bias_ih", (GATES * hidden,)),
                ("bias_hh", (GATES * hidden,)),
            ):
                shapes[f"lstm_{kind}_{layer}_{direction}"] = (f"lstm_head.{kind}_l{layer}{ending}", shape)
    return shapes


METHOD = Method(
    peft=PeftSide(
        "P_TUNING",
        PTuningSettings,
        prompts.FIELDS,
        {
            **prompts.BASE_FIELDS,
            "encoder_reparameterization_type": ("MLP", ANY),
            "encoder_hidden_size": (None, ANY),
            "encoder_num_layers": (MLP_LAYERS, ANY),
            "encoder_dropout": (0.0, ANY),
        },
        absent=prompts.ABSENT,
    ),
    model=PTuning,
    copy=prompts.ClassifierCopy,
    unbinding=frozenset({"encoder_hidden_size"}),  # a shape of the state
)
