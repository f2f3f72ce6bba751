"""Interfaces through which the folders of tunekit use each other. These modules import only typing, numpy, torch and
shared types.

Letters in shapes: B batch, T tokens, D hidden size, V vocabulary size, I/O input and output size, R rank, K number of
adapters.
"""

from tunekit.contracts.companion import *  # noqa: F403
from tunekit.contracts.images import *  # noqa: F403
from tunekit.contracts.model import *  # noqa: F403
from tunekit.contracts.objective import *  # noqa: F403
from tunekit.contracts.rows import *  # noqa: F403
