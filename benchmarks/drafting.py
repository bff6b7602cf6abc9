"""Ablation of drafting: trio x drafter x window or tree x rule x temperature, in one run on one machine.

Every way of drafting and per-step decoding take turns, repeat by repeat in alternating order after a warm-up each;
speeds over per-step are medians of paired repeats. Ways are named by what they are:

    per_step, per_step_coupled        this runtime without drafts; the second has the noise of `coupled`
    DRAFTER_G_RULE                    G drafts a cycle; "equality" is the rule of greedy decoding
    tree_DxN_RULE                     token trees of N nodes and at most D levels, where equality decides

Beside them stand, for sampling: tokens a cycle of `block` over `rejection` on the same prompts and seeds, and the
acceptance of `coupled` beside 1 - TV of the same positions and its bound. A table goes to standard error, one JSON line
to standard output.

Example:
    python benchmarks/drafting.py --demos arithmetic python --drafters expert lookup cascade --num-draft-tokens 4 8 \\
        --trees 4x16 --rules rejection block coupled --temperatures 0 1 --cost-ratio 0.1 --threads 2 --plot drafting.png
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script sees its own folder only

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM

from benchmarks.command import run_command
from benchmarks.decoders import Decode, Options, speculative
from benchmarks.measure import conditions
from benchmarks.prompts import repetitive_prompts
from benchmarks.rules import coupled_bound, tokens_a_cycle_ratio
from benchmarks.runs import pad_batches, summarise, take_turns
from benchmarks.tables import require_matplotlib
from benchmarks.trios import add_trio_arguments, check_trio, load_trio, prompt_texts, quiet
from specproxy import ProxyTunedModel
from specproxy.config import DRAFTER_NAMES, SamplingParameters, SpeculationParameters
from specproxy_kernels import RULES

__all__ = ["main", "measured"]

PER_STEP = "per_step"
EQUALITY = "equality"  # what greedy rows use under every rule


class Way(NamedTuple):
    """One way of drafting: `SpeculationParameters` without what they share."""

    drafter: str
    count: int | str
    nodes: int
    rule: str

    @property
    def name(self) -> str:
        """As it stands in the record."""
        window = f"tree_{self.count}x{self.nodes}" if self.nodes else f"{self.drafter}_{self.count}"
        return f"{window}_{self.rule}"

    def decoder(self, model: ProxyTunedModel, shared: Options) -> Decode:
        """What decodes so; greedy rows are equal under every rule."""
        rule = "coupled" if self.rule == EQUALITY else self.rule
        return speculative(model, shared, self.count, rule, self.drafter, self.nodes)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print.

    Returns:
        The exit code: 0, or 2 after an error, which stands on standard error in one line.
    """
    return run_command(measured, arguments)


def measured(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """What the command prints: measured as its arguments say.

    Raises:
        ValueError: for arguments that do not fit together.
        SpecProxyError: from the models.
    """
    options = _parser().parse_args(arguments)
    trees = _check(options)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    console = Console(stderr=True)
    record: dict[str, Any] = {"trios": []}
    with quiet():
        for demo in options.demos or [options.demo]:
            options.demo = demo
            model = _load(options)
            prompts = [model.tokenizer(text).input_ids for text in _texts(options)]
            name = demo or ("arithmetic" if options.base is None else str(options.base))
            laws = [_measure_law(model, prompts, t, trees, options, name, console) for t in options.temperatures]
            record["trios"].append({"trio": name, "alpha": model.alpha, "num_prompts": len(prompts), "laws": laws})
    record |= conditions(options, model.device)
    _print_tables(record, console)
    if options.plot is not None:
        _plot(record, options.plot)
    return record


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_trio_arguments(parser)
    work = parser.add_argument_group("work")
    work.add_argument("--demos", nargs="+", choices=["arithmetic", "python"], help="embedded trios, one after another")
    work.add_argument("--repetitive", action="store_true", help="texts that repeat themselves, in place of the task's")
    work.add_argument("--num-prompts", type=int, default=4, help="prompts of a repeat, at most")
    work.add_argument("--batch-size", type=int, default=1)
    work.add_argument("--max-new-tokens", type=int, default=96)
    work.add_argument("--ignore-eos", action="store_true", help="always decode --max-new-tokens")
    work.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 1.0], help="0 is greedy decoding")
    drafting = parser.add_argument_group("drafting")
    drafting.add_argument("--drafters", nargs="+", default=["expert", "lookup", "cascade"], choices=DRAFTER_NAMES)
    drafting.add_argument("--assistant", help='folder or hub name of the model that drafts as "assistant"')
    drafting.add_argument("--num-draft-tokens", nargs="+", default=["4"], metavar="N|auto")
    drafting.add_argument("--trees", nargs="+", default=[], metavar="LEVELSxNODES")
    drafting.add_argument("--rules", nargs="+", default=["rejection"], choices=RULES)
    run = parser.add_argument_group("run")
    run.add_argument("--repeats", type=int, default=5)
    run.add_argument("--threads", type=int, help="of torch; its own default otherwise")
    run.add_argument("--seed", type=int, default=0)
    run.add_argument("--plot", type=Path, help="write a chart of speeds over per-step to this PNG (needs matplotlib)")
    return parser


def _check(options: argparse.Namespace) -> list[tuple[int, int]]:
    """Everything that can be known to fail before models are loaded; the trees, as levels and nodes."""
    check_trio(options)
    if options.demos and (options.base or options.demo):
        raise ValueError("--demos names the trios; leave out --demo and --base.")
    if options.repetitive and options.prompts is not None:
        raise ValueError("--repetitive and --prompts exclude each other.")
    for name in ("max_new_tokens", "repeats", "num_prompts", "batch_size"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')}={getattr(options, name)} must be at least 1.")
    if ("assistant" in options.drafters) != (options.assistant is not None):
        raise ValueError("--assistant and --drafters assistant go together.")
    for temperature in options.temperatures:
        if temperature != 0:
            SamplingParameters(True, temperature)
    options.num_draft_tokens = [int(n) if n.isdecimal() else n for n in options.num_draft_tokens]
    if 0 in options.num_draft_tokens:
        raise ValueError("--num-draft-tokens 0 is per_step, which always runs; leave it out.")
    for count in options.num_draft_tokens:
        SpeculationParameters(count)
    trees = []
    for text in options.trees:
        levels, _, nodes = text.partition("x")
        if not (levels.isdecimal() and nodes.isdecimal() and int(nodes)):
            raise ValueError(f"--trees {text} must be levels x nodes, as 4x16.")
        SpeculationParameters(int(levels), num_tree_tokens=int(nodes))
        trees.append((int(levels), int(nodes)))
    if options.plot is not None:
        require_matplotlib()  # a missing one should be known before the work is done
    torch.empty(0, device=torch.device(options.device))
    return trees


def _load(options: argparse.Namespace) -> ProxyTunedModel:
    model = load_trio(options)
    if options.assistant is None:
        return model
    assistant = AutoModelForCausalLM.from_pretrained(options.assistant, dtype=model.base.dtype).to(model.device)
    return ProxyTunedModel(
        model.base, model.expert, model.anti_expert, model.tokenizer, model.alpha, assistant=assistant
    )


def _texts(options: argparse.Namespace) -> list[str]:
    return repetitive_prompts(options.num_prompts) if options.repetitive else prompt_texts(options)


def _ways(temperature: float, trees: list[tuple[int, int]], options: argparse.Namespace) -> list[Way]:
    """All ways of drafting under one law; trees where equality decides."""
    rules = [EQUALITY] if temperature == 0 else options.rules
    chains = [
        Way(drafter, count, 0, rule)
        for drafter in options.drafters
        for count in options.num_draft_tokens
        for rule in rules
    ]
    deciding = [rule for rule in rules if rule in (EQUALITY, "coupled")]
    return [*chains, *(Way("expert", levels, nodes, rule) for levels, nodes in trees for rule in deciding)]


def _measure_law(
    model: ProxyTunedModel,
    prompts: list[list[int]],
    temperature: float,
    trees: list[tuple[int, int]],
    options: argparse.Namespace,
    trio: str,
    console: Console,
) -> dict[str, Any]:
    """All ways of drafting at one temperature."""
    eos = frozenset() if options.ignore_eos else model._trio.eos_token_ids()
    pad = model._trio.pad_token_id() or 0
    shared = Options(options.max_new_tokens, temperature > 0, temperature or 1.0, 0, eos, pad)
    ways = {way.name: way for way in _ways(temperature, trees, options)}
    decoders = {PER_STEP: speculative(model, shared, 0, "rejection")}
    coupled = f"{PER_STEP}_coupled"
    if any(way.rule == "coupled" for way in ways.values()):
        decoders[coupled] = speculative(model, shared, 0, "coupled")
    decoders |= {name: way.decoder(model, shared) for name, way in ways.items()}
    texts = {EQUALITY: PER_STEP, "coupled": coupled}
    same = {name: texts[way.rule] for name, way in ways.items() if way.rule in texts}
    batches = pad_batches(prompts, options.batch_size, pad, model.device)
    models = {"base": model.base, "expert": model.expert, "anti_expert": model.anti_expert}
    title = f"{trio}, temperature {temperature:g}"
    runs, profiles = take_turns(decoders, batches, models, options.seed, options.repeats, title, console)
    summary = summarise(runs, profiles, options.batch_size, same)
    for name, row in summary["decoders"].items():
        if name in ways:
            row |= ways[name]._asdict()
    law: dict[str, Any] = {
        "temperature": temperature,
        "cost_ratio": summary["cost_ratio"],
        "token_ms": summary["token_ms"],
        "ways": summary["decoders"],
        "block_over_rejection": {
            f"{way.drafter}_{way.count}": tokens_a_cycle_ratio(runs[name], runs[way._replace(rule="rejection").name])
            for name, way in ways.items()
            if way.rule == "block" and way._replace(rule="rejection").name in runs
        },
    }
    if coupled in runs:
        law["coupled"] = coupled_bound(model, prompts, options.max_new_tokens, temperature)
    return law


def _print_tables(record: dict[str, Any], console: Console) -> None:
    """Per trio and temperature a table of ways, and a line for each comparison of rules."""
    if not console.is_terminal:
        console = Console(stderr=True, width=130)
    for trio in record["trios"]:
        for law in trio["laws"]:
            cost = "-" if law["cost_ratio"] is None else f"{law['cost_ratio']:.3f}"
            table = Table(title=f"{trio['trio']}, temperature {law['temperature']:g}, c = {cost}")
            table.add_column("way of drafting", no_wrap=True)
            for name in ("rate", "a", "tokens a cycle", "tokens/s", "over per-step", "same tokens"):
                table.add_column(name, justify="right")
            for name, row in law["ways"].items():
                acceptance = row["acceptance"]
                a = "-" if acceptance["a"] is None else f"{acceptance['a']:.3f}"
                same = {None: "-", True: "yes", False: "NO"}[row.get("same_tokens_as_per_step")]
                speed = f"{row['tokens_per_second']:.1f}", f"{row['over'][PER_STEP]:.2f}"
                table.add_row(name, f"{acceptance['rate']:.3f}", a, f"{acceptance['mean_length']:.2f}", *speed, same)
            console.print(table)
            for name, gain in law["block_over_rejection"].items():
                console.print(
                    f"{name}: block {gain['over']:.3f} tokens a cycle, rejection {gain['under']:.3f}, "
                    f"ratio {gain['ratio']:.4f} +- {gain['standard_error']:.4f}"
                )
            if "coupled" in law:
                bound = law["coupled"]
                console.print(
                    f"coupled, {bound['positions']} positions: equal to the draft {bound['coupled']:.3f}, "
                    f"1 - TV {bound['one_minus_tv']:.3f}, (1 - TV) / (1 + TV) {bound['bound']:.3f}"
                )


def _plot(record: dict[str, Any], path: Path) -> None:
    """Write a chart of speeds over per-step, a panel per trio and temperature."""
    require_matplotlib()
    from matplotlib import pyplot

    panels = [(trio, law) for trio in record["trios"] for law in trio["laws"]]
    figure, axes = pyplot.subplots(len(panels), 1, figsize=(9, 2 + 4 * len(panels)), squeeze=False)
    for axis, (trio, law) in zip(axes[:, 0], panels, strict=True):
        names = [name for name in law["ways"] if name != PER_STEP]
        speeds = [law["ways"][name]["over"][PER_STEP] for name in names]
        lengths = [law["ways"][name]["acceptance"]["mean_length"] for name in names]
        bars = axis.barh(names[::-1], speeds[::-1], color="tab:green")
        axis.bar_label(bars, [f"{length:.2f} tokens a cycle" for length in lengths[::-1]], padding=3, fontsize=7)
        axis.axvline(1.0, color="black", linewidth=0.8)
        axis.margins(x=0.25)
        axis.tick_params(axis="y", labelsize=7)
        axis.set_xlabel("tokens/s over per-step")
        axis.set_title(f"{trio['trio']}, temperature {law['temperature']:g}")
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())
