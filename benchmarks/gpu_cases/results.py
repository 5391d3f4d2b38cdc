"""Results on disk, merged over calls, and docs/benchmarks.md made from them."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gpu_cases.cases import CASES, Case

Record = dict[str, Any]

INTRODUCTION = """# Speed and memory

One GPU, random weights, the same token ids and labels on both sides. Before anything is timed, each side's gradients
are held to eager transformers and PEFT in fp32 on a shortened model of the same widths; who fails is not timed. Runs
are interleaved (A, B, A, B); a speed is the median over rounds, with the lowest and highest round in brackets, and
warm-up is left out. Unless a row says otherwise: Llama-3.1-8B shape, LoRA of rank 16 on all linear layers, rows of
2,048 tokens, 16,384 tokens in an optimizer step, bf16 on both sides. Tokens are never padding.

Every case sets `train.compile: true` on our side. Two or three rounds are few: their number is in the table of what
each case was measured on. Its commit is the code that was measured; code of later commits is not.

Peak is `max_memory_allocated` while training, with the reserved memory beside it. A limit ("within 19.7 GiB") is held
against allocated memory; reserved memory may be above it, and is in both bf16 cases under a limit.

Of DPO the reference's pass comes before the steps that are timed, on both sides (where TRL asks it in every step, its
setting says so); of GRPO a step is a whole rollout, sampled, judged and trained on, speeds count answers, and no
gradients are compared.
"""

AGAIN = """## Measuring again

On a machine with a GPU, one case takes a few minutes, and cases against the same peer share them:

```
python benchmarks/slim_wheels.py --out .whl                                          # the peers, pinned
python benchmarks/gpu.py --list
python benchmarks/gpu.py --case lora-bf16 --case lora-fp8 --wheels .whl
python benchmarks/gpu.py --tune full-8b --case full-8b --wheels .whl                 # TRL's fastest settings first
python benchmarks/gpu.py --tune dpo-1.5b --tune grpo-1.5b --case dpo-1.5b --case grpo-1.5b --wheels .whl --minutes 25
python benchmarks/gpu.py --make-rows dolly.jsonl --tokenizer LLAMA3 --rows ROWS      # for the real lengths
python benchmarks/gpu.py --case real-lengths --rows ROWS --wheels .whl
python benchmarks/gpu.py --table                                                     # this page
```
"""


def load_results(path: Path) -> Record:
    if not path.is_file():
        return {"schema": 1, "cases": {}, "tuned": {}}
    return json.loads(path.read_text(encoding="utf-8"))


def save_results(path: Path, results: Record) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def merge_results(into: Record, other: Mapping[str, Any]) -> Record:
    """`into` with the cases of `other`. Of two measurements of a case the later one stays; a failure never replaces a
    measurement, but stands beside it."""
    cases = dict(into["cases"])
    for name, record in other["cases"].items():
        before = cases.get(name)
        if "failed" in record and before is not None and "failed" not in before:
            cases[name] = before | {"failed_later": {k: record[k] for k in ("failed", "date", "commit")}}
        elif before is None or "failed" in before or record["date"] >= before["date"]:
            cases[name] = dict(record)
    return {**into, "cases": cases, "tuned": {**into["tuned"], **other["tuned"]}}


# --- figures ----------------------------------------------------------------------------------------------------------


def summarize(rounds: Sequence[Mapping[str, Any]]) -> Record:
    """Figures of one contender's timed rounds, each {"seconds", "tokens", "targets"} by step."""
    rates = [sum(r["tokens"]) / sum(r["seconds"]) for r in rounds]
    targets = [sum(r["targets"]) / sum(r["seconds"]) for r in rounds]
    seconds = sorted(second for r in rounds for second in r["seconds"])
    quarter = len(seconds) // 4
    return {
        "tokens_per_second": statistics.median(rates),
        "tokens_per_second_range": [min(rates), max(rates)],
        "target_tokens_per_second": statistics.median(targets),
        "step_seconds": statistics.median(seconds),
        "step_seconds_quartiles": [seconds[quarter], seconds[-1 - quarter]],
    }


def compute_ratio(case: Case, record: Mapping[str, Any]) -> Record:
    """Our speed over the peer's (or our seconds over the peer's, for the time to the first step), of medians and of
    each pair of rounds."""
    ours, peer = record["ours"], record["peer"]
    if case.measure == "start":
        pairs = [a / b for a, b in zip(ours["start_seconds"], peer["start_seconds"], strict=True)]
        value = statistics.median(ours["start_seconds"]) / statistics.median(peer["start_seconds"])
    else:
        rates = [[sum(r["tokens"]) / sum(r["seconds"]) for r in side["rounds"]] for side in (ours, peer)]
        pairs = [a / b for a, b in zip(*rates, strict=True)]
        value = statistics.median(rates[0]) / statistics.median(rates[1])
    return {"of_medians": value, "lowest": min(pairs), "highest": max(pairs)}


def judge(case: Case, record: Mapping[str, Any] | None) -> str:
    """One of: met, missed, not measured, failed, no bar. Which limit or bar is missed is said after a colon."""
    if record is None:
        return "not measured"
    if "failed" in record:
        return f"failed: {record['failed']}"
    faults: list[str] = []
    ratio = record["ratio"]["of_medians"]
    if case.measure == "start":
        if case.bar is not None and ratio > case.bar:
            faults.append(f"{_tell(ratio, case.bar)} of its time, the aim is at most {case.bar:g}")
    elif case.bar is not None and ratio < case.bar:
        faults.append(f"{_tell(ratio, case.bar)} times its speed, the aim is {case.bar:g}")
    if case.limit_gib is not None and (peak := record["ours"]["peak_bytes"] / 2**30) > case.limit_gib:
        faults.append(f"{peak:.1f} GiB, the limit is {case.limit_gib:g}")
    if faults:
        return "missed: " + "; ".join(faults)
    return "met" if case.bar is not None else "no bar"


def _tell(ratio: float, bar: float | None) -> str:
    """Two decimals; three where two would look like the bar."""
    return f"{ratio:.3f}" if bar is not None and f"{ratio:.2f}" == f"{bar:.2f}" else f"{ratio:.2f}"


# --- the page ---------------------------------------------------------------------------------------------------------


def make_page(results: Record, cpu: Sequence[Mapping[str, Any]] = (), *, more: Sequence[str] = ()) -> str:
    """docs/benchmarks.md. cpu: what cpu_vs_trl.py wrote, one record per shape. more: sections that other scripts make;
    an empty one has no results yet."""
    cases = results["cases"]
    lines = [
        "<!-- Made by `python benchmarks/gpu.py --table`; edit that script, not this page. -->",
        INTRODUCTION,
        *_speed_table(results),
        *_start_table(results),
        *_slow_steps(cases.get("real-lengths")),
        *_verdicts(results),
        *_origins(cases),
        "",
        AGAIN,
        *_cpu_table(cpu),
        *(line for section in more if section for line in ("", section)),
    ]
    return "\n".join(lines).rstrip() + "\n"


def read_cpu_results(folder: Path) -> list[Record]:
    """The records of cpu_vs_trl.py and cpu_dpo_vs_trl.py, the bundled model first."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("cpu_vs_trl*.json"))]


def _cpu_table(cpu: Sequence[Mapping[str, Any]]) -> list[str]:
    if not cpu:
        return []
    lines = [
        "## On a CPU",
        "",
        "LoRA against TRL and PEFT, same token ids and labels, interleaved. Times: TRL's CPU seconds of training over",
        "ours, of the medians, with the lowest and highest round in brackets. DPO's seconds hold the reference's pass",
        "on both sides. Made by `benchmarks/cpu_vs_trl.py` and `cpu_dpo_vs_trl.py`.",
        "",
        "| what | ours, tokens per CPU second | TRL's defaults, times | its best settings, times | best settings "
        "| rows x steps x rounds | CPU, threads | commit |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for record in cpu:
        ours = [run for run in record["runs"] if run["who"] == "tunesmith"]
        speed = ours[0]["num_tokens"] / statistics.median(run["cpu_seconds"] for run in ours)
        times = [
            f"{r['of_medians']:.2f} ({r['lowest']:.2f} to {r['highest']:.2f})"
            for r in (record["ratios"][who]["cpu_seconds"] for who in ("trl defaults", "trl best"))
        ]
        cells = [
            record["what"].removeprefix("LoRA training on a CPU, "),
            f"{speed:,.0f}",
            *times,
            record["trl_best_settings"]["name"],
            f"{record['batch_rows']} x {record['steps']} x {record['rounds']}",
            f"{record['hardware']['cpu']}, {record['threads'] or 'default'}",
            f"`{record['commit']}`",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _speed_table(results: Record) -> list[str]:
    cases = results["cases"]
    lines = [
        "| case | against | ours, tokens/s | theirs, tokens/s | times | aim | reached "
        "| our peak (reserved) GiB | their peak (reserved) GiB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for case in CASES.values():
        if case.measure != "speed":
            continue
        record, verdict = cases.get(case.name), judge(case, cases.get(case.name))
        aim = f"{case.bar:g}" if case.bar is not None else "none"
        head = f"| {case.what} | {_name_peer(case, results)} "
        if record is None or "failed" in record:
            lines.append(f"{head}| | | | {aim} | {verdict.partition(':')[0]} | | |")
            continue
        ratio = record["ratio"]
        lines.append(
            f"{head}| {_rate(record['ours'], case.unit)} | {_rate(record['peer'], case.unit)} "
            f"| {_tell(ratio['of_medians'], case.bar)} ({ratio['lowest']:.2f} to {ratio['highest']:.2f}) | {aim} "
            f"| {_reached(verdict)} | {_memory(record['ours'])} | {_memory(record['peer'])} |"
        )
    return [*lines, ""]


def _start_table(results: Record) -> list[str]:
    cases = results["cases"]
    lines = [
        "| time to the first step | against | ours, s | theirs, s | of theirs | aim, at most | reached |",
        "|---|---|---|---|---|---|---|",
    ]
    for case in CASES.values():
        if case.measure != "start":
            continue
        record, verdict = cases.get(case.name), judge(case, cases.get(case.name))
        head = f"| {case.what} | {_name_peer(case, results)} "
        if record is None or "failed" in record:
            lines.append(f"{head}| | | | {case.bar:g} | {verdict.partition(':')[0]} |")
            continue
        ours, peer = (statistics.median(record[side]["start_seconds"]) for side in ("ours", "peer"))
        ratio = record["ratio"]["of_medians"]
        lines.append(
            f"{head}| {ours:.1f} | {peer:.1f} | {_tell(ratio, case.bar)} | {case.bar:g} | {_reached(verdict)} |"
        )
    return [*lines, ""]


def _name_peer(case: Case, results: Record) -> str:
    """The peer, of several settings also which one, and whether others were tried."""
    setting = results["cases"].get(case.name, {}).get("peer_setting")
    if len(case.peer.settings) == 1 or not setting:
        return case.peer.label
    tuned = results["tuned"].get(case.name)
    if tuned and tuned["best"] == setting:
        how = f"the fastest of {len(tuned['tried'])} settings tried"
    elif setting == next(iter(case.peer.settings)):
        how = f"not tuned: the first of {len(case.peer.settings)} settings"
    else:
        how = f"not tuned: one of {len(case.peer.settings)} settings"
    return f"{case.peer.label} ({setting}; {how})"


def _slow_steps(record: Mapping[str, Any] | None) -> list[str]:
    """What is known of a peer that is far slower than on rows of one length: its figures, and no reason."""
    if record is None or "failed" in record:
        return []
    rounds = record["peer"]["rounds"]
    seconds = [second for one in rounds for second in one["seconds"]]
    tokens = [count for one in rounds for count in one["tokens"]]
    return [
        f"On real lengths a step of Unsloth takes {min(seconds):.2f} to {max(seconds):.2f} s, for "
        f"{statistics.mean(tokens):,.0f} tokens in the mean. Why so long, we have not found out.",
        "",
    ]


def _rate(side: Mapping[str, Any], unit: str) -> str:
    """Median and range; of what is not tokens, its name."""
    low, high = side["tokens_per_second_range"]
    if unit != "tokens":
        return f"{side['tokens_per_second']:,.1f} ({low:,.1f} to {high:,.1f}) {unit}"
    return f"{side['tokens_per_second']:,.0f} ({low:,.0f} to {high:,.0f})"


def _memory(side: Mapping[str, Any]) -> str:
    return f"{side['peak_bytes'] / 2**30:.1f} ({side['reserved_bytes'] / 2**30:.1f})"


def _reached(verdict: str) -> str:
    return {"met": "yes", "no bar": ""}.get(verdict, "**no**")


def _verdicts(results: Record) -> list[str]:
    """What was not reached, one line each, before what it was measured on."""
    cases = results["cases"]
    missed: list[str] = []
    for case in CASES.values():
        verdict, record = judge(case, cases.get(case.name)), cases.get(case.name) or {}
        if verdict == "not measured" or verdict.startswith(("missed", "failed")):
            missed.append(
                f"- {case.what}, against {_name_peer(case, results)}: {verdict.replace('missed: ', '')}."
            )
        if record.get("parity") == "skipped":
            missed.append(f"- {case.what}: measured without the gradient check.")
        if later := record.get("failed_later"):
            missed.append(f"- {case.what}: a later run failed ({later['failed']}).")
    return ["## What falls short, or is open", "", *(missed or ["Nothing."]), ""]


def _origins(cases: Mapping[str, Record]) -> list[str]:
    lines = ["## What each case was measured on, and how the two sides compute", ""]
    lines += [
        "| case | GPU | commit | date | rounds x steps | target tokens/s, ours / theirs | step ms, ours / theirs "
        "| loss of the first and last step, ours / theirs | gradient distance from fp32, ours / theirs "
        "| loading and warm-up s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    versions: dict[str, set[str]] = {}
    for name, record in cases.items():
        if "failed" in record or name not in CASES:
            continue
        sides = [record["ours"], record["peer"]]
        for side in sides:
            for package, version in side["facts"]["versions"].items():
                versions.setdefault(package, set()).add(version)
        parity = record["parity"]
        distances = (
            parity
            if isinstance(parity, str)
            else " / ".join(f"{parity[who]['distance']['total']:.3g}" for who in ("ours", "peer"))
        )
        speed = CASES[name].measure == "speed"
        cells = [
            name,
            record["hardware"].get("gpu", "none"),
            f"`{record['commit'] or record['code'][:12]}`",
            record["date"],
            f"{record['num_rounds']} x {record['steps']}",
            _pair(sides, lambda s: f"{s['target_tokens_per_second']:,.0f}") if speed else "",
            _pair(sides, lambda s: f"{1e3 * s['step_seconds']:,.0f}") if speed else "",
            _pair(sides, lambda s: f"{s['first_loss']:.3f}, {s['last_loss']:.3f}"),
            distances,
            _pair(sides, lambda s: f"{s.get('load_seconds', 0.0) + s['warm_up_seconds']:.0f}")
            if speed
            else "",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    if not versions:
        return ["## What each case was measured on", "", "Nothing is measured yet."]
    lines += [
        "",
        "Versions: " + ", ".join(f"{p} {' and '.join(sorted(v))}" for p, v in sorted(versions.items())) + ".",
    ]
    lines += ["", "Single measurements, settings and commands: `benchmarks/results/gpu.json`."]
    return lines


def _pair(sides: Sequence[Any], show: Any) -> str:
    return " / ".join(show(side) for side in sides)
