"""Writes a page of sections as Markdown, such as report.md."""

from collections.abc import Iterator, Sequence

from tunekit.artifacts.report.sections import Bar, MarkedText, ReportPage, ReportSection, ReportTable
from tunekit.artifacts.run import PICTURES
from tunekit.console.text import cell_text, curve_text, means_of, visible
from tunekit.errors import redact

CURVE_COLUMNS = 60
MOST_ROWS = 40  # maximum number of rows of a table
SPECIAL = "\\`*_{}[]<>#|!~&"


def markdown_page(page: ReportPage) -> str:
    """The page as Markdown."""
    verdict = [f"**{escape(page.verdict)}**"] if page.verdict else []
    blocks = [f"# {escape(page.title)}", *map(escape, page.intro), *verdict]
    return "\n\n".join([*blocks, *(block for section in page.sections for block in _section(section))]) + "\n"


def escape(value: object) -> str:
    """A text from a recipe or a file, escaped for Markdown: on one line, without secrets and control characters."""
    flat = visible(" ".join(redact(str(value)).split()))
    return "".join(f"\\{letter}" if letter in SPECIAL else letter for letter in flat)


def _section(section: ReportSection) -> Iterator[str]:
    if section.title:
        yield f"## {escape(section.title)}"
    yield from map(escape, section.paragraphs)
    yield from (f"**{escape(warning)}**" for warning in section.warnings)
    if section.tiles:
        yield markdown_table(["", "", ""], section.tiles)
    series = section.charts[0].series[0] if section.charts else None
    if series is not None and len(series.y) > 2:
        yield _fenced(f"{section.charts[0].title}, {series.label}\n{curve(series.y)}")
    if section.bars:
        yield _bar_table(section.bars)
    for table in section.tables:
        yield from _titled(table)
    for row in section.pictures:
        images = (f"![{escape(title)}]({PICTURES}/{path.name}) {escape(title)}" for title, path in row.pictures)
        yield f"{escape(row.prompt)}: {', '.join(images)}"
    if section.commands:
        yield _fenced("\n".join(section.commands), "sh")
    for name, text in section.files:
        yield f"{escape(name)}:"
        yield _fenced(text.rstrip("\n"))


def _titled(table: ReportTable) -> Iterator[str]:
    if table.title:
        yield f"{escape(table.title)}:"
    yield markdown_table(table.head, table.rows[:MOST_ROWS], ":--" if table.has_texts else "--:")
    if len(table.rows) > MOST_ROWS:
        yield f"{len(table.rows) - MOST_ROWS:,} more are in report.html."


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[object]], alignment: str = "--:") -> str:
    """A Markdown table. `alignment`: the alignment of all columns except the first."""
    lines = [f"| {' | '.join(map(_cell, row))} |" for row in (head, *rows)]
    lines.insert(1, f"|{'|'.join([':--', *[alignment] * (len(head) - 1)])}|")
    return "\n".join(lines)


def _cell(value: object) -> str:
    if isinstance(value, MarkedText):
        return escape("".join(f"⟦{text}⟧" if marked else text for text, marked in value.stretches))
    return escape(cell_text(value))


def _bar_table(bars: Sequence[Bar]) -> str:
    """A table with a line for each part and a column for each bar."""
    columns = [{name: text for name, _, text in bar.parts} for bar in bars]
    names = dict.fromkeys(name for column in columns for name in column)
    rows = [[name, *(column.get(name) for column in columns)] for name in names]
    return markdown_table(["part", *(bar.title for bar in bars)], rows)


def curve(values: Sequence[float]) -> str:
    """The values as a line of text bars, followed by the highest and the lowest bar. Each bar is the mean of several
    values."""
    means = means_of(values, CURVE_COLUMNS)
    return f"{curve_text(values, CURVE_COLUMNS)}  {cell_text(max(means))} to {cell_text(min(means))}"


def _fenced(text: str, language: str = "") -> str:
    """The text in a code block, without secrets and control characters. The fence of the block is longer than every
    fence in the text."""
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}{language}\n{visible(redact(text))}\n{fence}"
