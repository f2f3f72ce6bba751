"""Matches regular expressions with module names. The expressions are untrusted, so an expression that would run almost
without end is refused."""

import time
from dataclasses import dataclass

from tunekit.errors import AdapterError, InputError
from tunekit.files.patterns import compile_pattern

PROCESSOR_SECONDS = 4.0  # to match all patterns of an adapter with all names; usual patterns take microseconds
SHORTEST = 1e-3  # minimum time for a pattern, in seconds


@dataclass
class Patterns:
    """Compiles and matches the patterns of one adapter. Their file and settings key appear in messages, and their total
    processor time is limited.

    Raises: `error` if a pattern is invalid or refused (see compile_pattern), or if the time is used up.
    """

    error: type[InputError] = AdapterError
    file: str | None = None
    key: str | None = None
    seconds: float = PROCESSOR_SECONDS

    def matches(self, text: str, name: str) -> bool:
        """re.fullmatch(text, name)."""
        return self._match(text, "{}", name)

    def matches_ending(self, text: str, name: str) -> bool:
        """re.match(rf"(.*\\.)?({text})$", name): PEFT's matching of rank and alpha patterns."""
        return self._match(text, r"(?:.*\.)?(?:{})$", name)

    def matches_as_before(self, text: str, name: str) -> bool:
        """re.match(rf".*\\.{text}$", name): how PEFT matched these patterns before 0.15, without grouping
        alternatives."""
        return self._match(text, r"(?:.*\.{}$)(?s:.*)", name)

    def _match(self, text: str, template: str, name: str) -> bool:
        start = time.process_time()
        try:
            return compile_pattern(text, template).fullmatch(name, timeout=self.seconds) is not None
        except TimeoutError as error:
            raise self._refusal(text, f"takes too many steps to match the name '{name}'") from error
        except ValueError as error:
            raise self._refusal(text, str(error)) from error
        finally:
            self.seconds = max(self.seconds - (time.process_time() - start), SHORTEST)

    def _refusal(self, text: str, why: str) -> InputError:
        shortened = text if len(text) <= 80 else text[:77] + "..."
        how = "use a simpler pattern, or list the module names"
        return self.error(f"the pattern '{shortened}' {why}", how, file=self.file, key=self.key)
