"""The interfaces between the folders of tunekit. These modules import only typing, numpy, torch and shared types.

Letters in shapes: B batch, T tokens, D hidden, V vocabulary, I/O in/out, R rank, K adapters.
"""

from tunekit.contracts.model import *  # noqa: F403
from tunekit.contracts.objective import *  # noqa: F403
from tunekit.contracts.rows import *  # noqa: F403
