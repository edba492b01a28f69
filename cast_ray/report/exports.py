"""A report for people and programs: `report.md`, `report.csv`, `report.tex`, `report.json`."""

from __future__ import annotations

import csv
import dataclasses
import io
import re
from collections.abc import Sequence
from typing import Any
from urllib.parse import quote

from cast_ray.report.blocks import Article, Block, Figure, Grid, Picture, Samples, Words
from cast_ray.report.content import Difference, Report
from cast_ray.report.markup import latex_text, markdown_code, markdown_text, one_line
from cast_ray.report.metrics import format_signed, format_value, label_of, paper_label, split_metric


def markdown_page(articles: Sequence[Article]) -> str:
    """`report.md`: each table's sections; figures are files beside it."""
    lines = []
    for article in articles:
        lines += [f"# {markdown_text(article.title)}", ""]
        lines += [
            f"- {name}: {markdown_code(text) if name == 'command' else markdown_text(text)}"
            for name, text in article.context.items()
        ]
        lines.append("")
        for made in article.sections:
            lines += [f"## {markdown_text(made.title)}", ""]
            for block in made.blocks:
                lines += _markdown_block(block, article, len(articles))
    return "\n".join(lines).rstrip() + "\n"


def figure_file(article: Article, figure: Figure, num_articles: int) -> str:
    """Name of a figure's PNG; with several tables in a folder the table's name comes first."""
    return f"{figure.name}.png" if num_articles == 1 else f"{article.name}-{figure.name}.png"


def _markdown_block(block: Block, article: Article, num_articles: int) -> list[str]:
    if isinstance(block, Grid):
        head = [markdown_text(c.name) for c in block.columns]
        rule = ["---:" if c.is_number else "---" for c in block.columns]
        body = [[markdown_text(text) for text in line] for line in block.body]
        return [
            f"{markdown_text(block.caption)}:",
            "",
            *(f"| {' | '.join(cells)} |" for cells in (head, rule, *body)),
            "",
        ]
    if isinstance(block, Words):
        if block.kind == "list":
            return [*(f"- {markdown_text(line)}" for line in block.lines), ""]
        mark = "**FAILED** " if block.kind == "failed" else ""
        return [part for line in block.lines for part in (mark + markdown_text(line), "")]
    if isinstance(block, Figure | Picture):
        file = figure_file(article, block, num_articles) if isinstance(block, Figure) else block.path.name
        caption = markdown_text(block.caption)
        return [f"![{caption}]({quote(file)})", "", f"*{caption}.*", ""]
    if isinstance(block, Samples):
        return [f"{markdown_text(block.caption)}: see `report.html`.", ""]
    return []  # details: each result's own file holds them


def csv_page(reports: Sequence[Report]) -> str:
    """`report.csv`: a line for each table, row and metric, unrounded."""
    names = ["table", "row", "metric", "seeds_done", "seeds", "mean", "sd", "low", "high", "paper"]
    names += ["difference", "difference_low", "difference_high", "paired_seeds", "resampled"]
    names += ["decision", "decided_at_seed", "bound_low", "bound_high", "own_device_hours", "seeds_needed"]
    text = io.StringIO()
    writer = csv.DictWriter(text, names, restval="", lineterminator="\n")
    writer.writeheader()
    for report in reports:
        decisions = {decision.row: decision for decision in report.decisions}
        for row in report.rows:
            lines: list[dict[str, Any]] = []
            for metric in dict.fromkeys([*report.metrics, *row.cells]):
                cell, difference = row.cells.get(metric), report.differences_in(metric).get(row.name)
                line: dict[str, Any] = {"metric": metric, "paper": row.paper.get(metric)}
                if cell is not None:
                    line |= {"mean": cell.mean, "sd": cell.sd}
                    line |= {"low": cell.interval.low, "high": cell.interval.high} if cell.interval else {}
                if difference is not None:
                    line |= {"difference": difference.mean, "paired_seeds": difference.num_seeds}
                    if interval := difference.interval:
                        line |= {"difference_low": interval.low, "difference_high": interval.high}
                        line |= {"resampled": interval.resampled}
                if metric == report.metric and (decision := decisions.get(row.name)) is not None:
                    line |= {"decision": decision.answer, "decided_at_seed": decision.decided_at}
                    line |= {"bound_low": decision.low, "bound_high": decision.high}
                    line |= {"own_device_hours": decision.device_hours}
                    line |= {"seeds_needed": decision.forecast.median} if decision.forecast else {}
                lines.append(line)
            shared = {"table": report.table, "row": row.name, "seeds": row.num_seeds}
            writer.writerows(shared | {"seeds_done": len(row.seeds_done)} | line for line in lines)
    return text.getvalue()


def latex_page(reports: Sequence[Report]) -> str:
    r"""`report.tex`: one booktabs table each, to \input into a paper."""
    return "% needs \\usepackage{booktabs}\n" + "\n".join(_latex_table(report) for report in reports)


def _latex_table(report: Report) -> str:
    metrics = [m for m in report.metrics if m == report.metric or not split_metric(m)[1].startswith("ap")]
    with_paper = [m for m in metrics if any(m in row.paper for row in report.rows)]
    differences = report.differences_in(report.metric)
    head, align = ["", "seeds"], "lr"
    for metric in metrics:
        head.append(latex_text(label_of(metric)))
        if metric in with_paper:
            head.append(latex_text(paper_label(metric, report.paper_metric)))
        align += "rr" if metric in with_paper else "r"
        if metric == report.metric and differences:
            head += [rf"$\Delta$ {latex_text(report.baseline)}", r"95\,\% interval"]
            align += "rr"
    lines = [" & ".join(head) + r" \\"]
    for row in report.rows:
        done = len(row.seeds_done)
        cells = [latex_text(row.name), str(done) if done or not row.num_failed else "failed"]
        for metric in metrics:
            cell = row.cells.get(metric)
            spread = rf" \pm {format_value(metric, cell.sd)}" if cell and cell.sd is not None else ""
            cells.append(f"${format_value(metric, cell.mean)}{spread}$" if cell else "--")
            if metric in with_paper:
                cells.append(f"${format_value(metric, row.paper[metric])}$" if metric in row.paper else "--")
            if metric == report.metric and differences:
                cells += _latex_difference(differences.get(row.name))
        lines.append(" & ".join(cells) + r" \\")
    # a caption says how the numbers were made; what they show is for the text around it
    told = [note for note in report.notes if note.startswith(("Up to", "*", "The paper"))]
    left = [f"% {one_line(note)}" for note in report.notes if note not in told]
    caption = " ".join([f"{report.title}.", *told])
    return "\n".join(
        [
            *left,
            r"\begin{table}",
            r"  \centering\small",
            rf"  \caption{{{latex_text(caption)}}}",
            rf"  \label{{tab:{re.sub('[^a-z0-9-]', '-', report.table.lower())}}}",
            rf"  \begin{{tabular}}{{{align}}}",
            r"    \toprule",
            f"    {lines[0]}",
            r"    \midrule",
            *(f"    {line}" for line in lines[1:]),
            r"    \bottomrule",
            r"  \end{tabular}",
            r"\end{table}",
            "",
        ]
    )


def _latex_difference(difference: Difference | None) -> list[str]:
    if difference is None:
        return ["--", "--"]
    signed = [f"${format_signed(difference.metric, difference.mean)}$"]
    interval = difference.interval
    if interval is None or interval.resampled == "images":  # which is no uncertainty of a row
        return [*signed, "--"]
    low, high = (format_signed(difference.metric, value) for value in (interval.low, interval.high))
    return [*signed, f"$[{low}, {high}]$"]


def json_page(reports: Sequence[Report]) -> dict[str, Any]:
    """`report.json`: the same as plain data, without the raw results it was made from."""
    tables = []
    for report in reports:
        page = dataclasses.asdict(dataclasses.replace(report, results=()))
        page.pop("results")
        tables.append(page)
    return {"tables": tables}
