"""Regular expressions over module names, which anyone may have written: a hostile one is refused, it never hangs."""

import time
from dataclasses import dataclass

from tunekit.errors import AdapterError, InputError
from tunekit.files.untrusted import compile_pattern

PROCESSOR_SECONDS = 4.0  # for all patterns of one adapter against all names; an everyday pattern takes microseconds
SHORTEST = 1e-3  # what is left for the next one, which then runs out of it


@dataclass
class Patterns:
    """The patterns of one adapter: where they stand, for messages, and the processor time that they have together.

    Raises: `error` where a pattern is no regular expression, or one that is refused (see compile_pattern), or where
    the time is used up.
    """

    error: type[InputError] = AdapterError
    file: str | None = None
    key: str | None = None
    seconds: float = PROCESSOR_SECONDS

    def matches(self, text: str, name: str) -> bool:
        """re.fullmatch(text, name)."""
        return self._match(text, "{}", name)

    def matches_ending(self, text: str, name: str) -> bool:
        """re.match(rf"(.*\\.)?({text})$", name): how rank and alpha patterns match in PEFT."""
        return self._match(text, r"(?:.*\.)?(?:{})$", name)

    def _match(self, text: str, template: str, name: str) -> bool:
        start = time.process_time()
        try:
            return compile_pattern(text, template).fullmatch(name, timeout=self.seconds) is not None
        except TimeoutError as error:
            raise self._refused(text, f"takes too many steps to compare with the name '{name}'") from error
        except ValueError as error:
            raise self._refused(text, str(error)) from error
        finally:
            self.seconds = max(self.seconds - (time.process_time() - start), SHORTEST)

    def _refused(self, text: str, why: str) -> InputError:
        shown = text if len(text) <= 80 else text[:77] + "..."
        how = "use a simpler pattern, or list the module names"
        return self.error(f"the pattern '{shown}' {why}", how, file=self.file, key=self.key)
