"""What an order's line is worth: a share of 1 for each of its fields that is right."""


def fields(completions, answer, **columns):
    """A number for each completion; `answer` is the right line of its row, as the other columns would be."""
    return [share(said[0]["content"], right) for said, right in zip(completions, answer, strict=True)]


def share(line, right):
    said, meant = ([field.strip() for field in text.strip().split("|")] for text in (line, right))
    if len(said) != len(meant):
        return 0.0
    return sum(ours == theirs for ours, theirs in zip(said, meant, strict=True)) / len(meant)
