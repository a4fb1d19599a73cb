"""Share of small faults in kdray's mathematics that its unit tests find: mutation testing.

    make mutants              # goes on where it was interrupted; MINUTES=7 ends after so many; rm -r build/mutants begins anew

mutmut makes the faults (mutants): each changes one operator, number, argument or name of one function. The tests that reach
the function then run until one fails, in a fork of a process that has collected all tests; if none fails and the function runs
while tests are imported, in a new process too. A mutant that no test notices survives.
Each that was judged keeps its verdict in `benchmarks/results/mutants.json` for as long as its line is the same: `equivalent`
if no test could tell it from the original.

Not mutated: code outside of functions, types, and texts of error messages.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from importlib.metadata import version
from itertools import zip_longest
from pathlib import Path
from typing import Any

from mutmut.mutation import trampoline
from mutmut.mutation.file_mutation import mutate_file_contents

from benchmarks.measured import RESULTS, write

ROOT = Path(__file__).parents[1]
TREE = ROOT / "build" / "mutants"
MADE, REACHED, OUTCOMES = TREE / "mutants.json", TREE / "reached.jsonl", TREE / "outcomes.jsonl"
SOURCES = [
    *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "kdray/losses").glob("*.py")),
    "kdray/rollouts/mixture.py",
    "kdray/rollouts/batching.py",
    "kdray/teachers/ensemble.py",
    "kdray/teachers/cross_tokenizer.py",
]
TESTS = [
    "tests/unit/kdray/losses",
    "tests/unit/kdray/test_api.py",
    "tests/unit/kdray/data/test_pretraining.py",
    "tests/unit/actors/student/test_float32_head.py",
    "tests/unit/kdray/rollouts/test_mixture.py",
    "tests/unit/kdray/rollouts/test_batching.py",
    "tests/unit/kdray/teachers/test_ensemble.py",
    "tests/unit/kdray/teachers/test_team.py",
    "tests/unit/kdray/teachers/test_cross_tokenizer.py",
    "tests/unit/kdray/teachers/test_alignment.py",
]
ENDED_BY_TIME = (signal.SIGXCPU, signal.SIGKILL)


# ------------------------------------------------------------------------------------------------------ the tree


def make_tree() -> dict[str, dict[str, Any]]:
    """Copy the project to `build/mutants`, with mutated modules; return source and change of each mutant, by its name."""
    shutil.rmtree(TREE / "project", ignore_errors=True)
    project = TREE / "project"
    for name in ("kdray", "actors", "cluster", "tests", "benchmarks", "configs", "docs"):
        shutil.copytree(ROOT / name, project / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", project)
    (project / "setup.cfg").write_text("[mutmut]\nsource_paths=kdray\n")
    os.chdir(project)
    mutants: dict[str, dict[str, Any]] = {}
    for source in SOURCES:
        made = mutate_file_contents(source, undecorated(Path(source).read_text()))
        Path(source).write_text(made.code)
        lines, module = made.code.splitlines(), source.removesuffix(".py").replace("/", ".")
        spans = made.line_span_by_function_name
        for name in made.mutant_names:
            original = spans[re.sub(r"__mutmut_\d+$", "__mutmut_orig", name)]
            change = changed(*(lines[span.start - 1 : span.end] for span in (original, spans[name])))
            if change and not only_text(change):
                mutants[f"{module}.{name}"] = {"source": source, "change": change}
    MADE.write_text(json.dumps(mutants, indent=1))
    return mutants


def undecorated(code: str) -> str:
    """The same module with decorators applied below the function: mutmut leaves decorated functions alone."""
    lines = code.splitlines()
    functions = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.FunctionDef) and node.decorator_list]
    for node in sorted(functions, key=lambda node: -node.lineno):
        names = [ast.unparse(decorator) for decorator in node.decorator_list]
        if names == ["classmethod"]:
            continue
        applied = node.name
        for name in reversed(names):
            applied = f"{name}({applied})"
        assert node.end_lineno is not None
        lines.insert(node.end_lineno, " " * node.col_offset + f"{node.name} = {applied}")
        for decorator in node.decorator_list:
            lines[decorator.lineno - 1] = ""
    return "\n".join(lines) + "\n"


def evenly(mutants: dict[str, dict[str, Any]]) -> list[str]:
    """The mutants in an order of which every beginning is an even sample of each module, with equal numbers from all."""
    by_source: dict[str, list[str]] = defaultdict(list)
    for name, mutant in mutants.items():
        by_source[mutant["source"]].append(name)
    for names in by_source.values():
        random.Random(0).shuffle(names)
    return [name for part in zip_longest(*by_source.values()) for name in part if name is not None]


def changed(original: list[str], mutant: list[str]) -> str:
    """The first line that differs, before and after; empty if none does."""
    own, other = ([re.sub(r"__mutmut_(?:orig|\d+)\b", "", line).strip() for line in lines] for lines in (original, mutant))
    pairs = zip_longest(own, other, fillvalue="")
    return next((f"{before}  ->  {after}" for before, after in pairs if before != after), "")


def only_text(change: str) -> bool:
    """True for a change of letters alone in a text of several words, such as an error's."""
    before, _, after = change.partition("  ->  ")
    texts = re.fullmatch(r'(?:\w+\()?f?"[^"]* [^"]*",?\)?(?: from \w+)?', before) or "raise " in before
    return bool(texts) and (before.lower() == after.lower() or "XX" in after)


# --------------------------------------------------------------------------------------------------------- the run


class Mutants:
    """A pytest plugin that runs mutants instead of tests, each in a fork, and notes what became of it."""

    def __init__(self, names: list[str], ends_at: float) -> None:
        self.names = names
        self.ends_at = ends_at
        self.results = OUTCOMES.open("a", buffering=1)
        self.imported: set[str] = set()
        """Functions that run while tests are imported, which a fork comes too late for."""
        trampoline.record_trampoline_hit = lambda name, caller=None: self.imported.add(name)
        trampoline.set_mutant_under_test("stats")

    def pytest_runtestloop(self, session: Any) -> bool:
        without_shrinking(session.items)
        items = {item.nodeid: item for item in session.items}
        seconds, tests_of = self.reach(session.items)
        for name in self.names:
            if time.time() > self.ends_at:
                break
            function = re.sub(r"__mutmut_\d+$", "", name)
            tests = sorted(tests_of.get(function, ()), key=lambda test: seconds[test])
            chosen = [items[test] for test in tests if test in items]
            began = time.time()
            outcome = self.outcome(name, chosen, sum(seconds[test] for test in tests)) if chosen else "no test"
            if outcome in ("survived", "no test") and function in self.imported:
                outcome = self.in_a_new_process(name)
            line = {"mutant": name, "outcome": outcome, "tests": len(chosen), "seconds": round(time.time() - began, 2)}
            self.results.write(json.dumps(line) + "\n")
        return True

    def in_a_new_process(self, name: str) -> str:
        """The outcome over all tests, with the mutant in place while they are imported."""
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--rootdir=.", *TESTS]
        paths = os.pathsep.join([str(TREE / "project"), os.environ.get("PYTHONPATH", "")])
        environment = os.environ | {"MUTANT_UNDER_TEST": name, "PYTHONPATH": paths}
        found = subprocess.run(command, env=environment, capture_output=True, check=False)
        return "killed" if found.returncode else "survived"

    def reach(self, tests: list[Any]) -> tuple[dict[str, float], dict[str, list[str]]]:
        """Run every test once. Returns: seconds of each; the tests that pass and reach each function."""
        known = {line["test"]: line for line in lines_of(REACHED)}
        found: set[str] = set()
        trampoline.record_trampoline_hit = lambda name, caller=None: found.add(name)
        trampoline.set_mutant_under_test("stats")
        with REACHED.open("a", buffering=1) as file:
            for item in tests:
                if item.nodeid in known:
                    continue
                found.clear()
                began = time.process_time()
                if not passes(item):
                    # Such as one that looks for files beside the packages, which the copy has not.
                    print(f"left out, as it fails without a mutant: {item.nodeid}", flush=True)
                    found.clear()
                seconds = time.process_time() - began
                known[item.nodeid] = {"test": item.nodeid, "seconds": round(seconds, 4), "functions": sorted(found)}
                file.write(json.dumps(known[item.nodeid]) + "\n")
        tests_of: dict[str, list[str]] = defaultdict(list)
        for test, line in known.items():
            for name in line["functions"]:
                tests_of[name].append(test)
        return {test: line["seconds"] for test, line in known.items()}, tests_of

    def outcome(self, name: str, items: list[Any], seconds: float) -> str:
        """`killed`, `out of time` or `survived`."""
        child = os.fork()
        if child == 0:
            limit = int(10 + 10 * seconds)
            resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 1))
            silence = os.open(os.devnull, os.O_WRONLY)
            os.dup2(silence, 1)
            os.dup2(silence, 2)
            trampoline.set_mutant_under_test(name)
            try:
                killed = not all(passes(item) for item in items)
            except BaseException:
                killed = True
            os._exit(1 if killed else 0)
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            return "out of time" if os.WTERMSIG(status) in ENDED_BY_TIME else "killed"
        return "killed" if os.WEXITSTATUS(status) else "survived"


def passes(item: Any) -> bool:
    """Run one collected test, with its fixtures; True unless a part of it failed."""
    from _pytest.runner import runtestprotocol

    return not any(report.failed for report in runtestprotocol(item, nextitem=None, log=False))


def without_shrinking(items: list[Any]) -> None:
    """Property tests try the same examples in every process, and end with the first that fails."""
    from hypothesis import Phase, settings

    for item in items:
        own = getattr(item.obj, "_hypothesis_internal_use_settings", None)
        if own is not None:
            function = getattr(item.obj, "__func__", item.obj)
            phases = (Phase.explicit, Phase.generate)
            function._hypothesis_internal_use_settings = settings(own, phases=phases, derandomize=True, database=None)


# ------------------------------------------------------------------------------------------------------ the report


def results() -> dict[str, dict[str, Any]]:
    """The last outcome of every mutant that ran."""
    return {line["mutant"]: line for line in lines_of(OUTCOMES)}


def lines_of(path: Path) -> list[dict[str, Any]]:
    """Lines of JSON; none if the file is not there."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def key(mutant: dict[str, Any], name: str) -> tuple[str, str]:
    """What identifies a change over versions: its function and its line."""
    return re.sub(r"__mutmut_\d+$", "", name), mutant["change"]


def report(mutants: dict[str, dict[str, Any]], commit: str) -> str:
    """Write `benchmarks/results/mutants.json`; return the table of modules, as Markdown."""
    path = RESULTS / "mutants.json"
    earlier = json.loads(path.read_text())["survivors"] if path.exists() else []
    judged = {(each["function"], each["change"]): each["verdict"] for each in earlier}
    done = results()
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    survivors = []
    for name, mutant in mutants.items():
        if name not in done:
            continue
        outcome = done[name]["outcome"]
        killed = outcome in ("killed", "out of time")
        function, change = key(mutant, name)
        verdict = judged.get((function, change), "not judged")
        kind = "killed" if killed else "equivalent" if verdict.startswith("equivalent") else "survived"
        counts[mutant["source"]][kind] += 1
        if not killed:
            survivors.append({"function": function, "change": change, "outcome": outcome, "verdict": verdict})
    modules = {source: dict(sorted(counts[source].items())) for source in SOURCES if counts[source]}
    tool = {"mutmut": version("mutmut")}
    write("mutants", ("torch", "numpy", "pytest"), {"commit": commit, **tool, "modules": modules, "survivors": survivors})
    return "\n".join(table(modules))


def table(modules: dict[str, dict[str, int]]) -> Iterator[str]:
    """Lines of the table: killed, equivalent and surviving mutants by module, and the share killed of those that can be."""
    yield "| module | mutants | equivalent | killed | survived | killed of those that differ |"
    yield "|---|---|---|---|---|---|"
    total: Counter[str] = Counter()
    for counts in modules.values():
        total.update(counts)
    for source, counts in [*modules.items(), ("all", total)]:
        killed, survived, same = (counts.get(kind, 0) for kind in ("killed", "survived", "equivalent"))
        share = f"{100 * killed / max(1, killed + survived):.1f}%"
        yield f"| {source} | {killed + survived + same} | {same} | {killed} | {survived} | {share} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=600.0, help="end after so many; the next call goes on")
    parser.add_argument("--only", default="", help="a regular expression on the names of mutants")
    parser.add_argument("--again", action="store_true", help="run survivors of an earlier call again, with the tests of now")
    parser.add_argument("--commit", default="", help="the commit that is measured, for the record")
    parser.add_argument("--report", action="store_true", help="write the results of what has run")
    arguments = parser.parse_args()
    ends_at = time.time() + 60.0 * arguments.minutes
    TREE.mkdir(parents=True, exist_ok=True)
    if arguments.report:
        print(report(json.loads(MADE.read_text()), arguments.commit))
        return
    mutants = make_tree()
    done = results()
    again = {name for name, line in done.items() if line["outcome"] in ("survived", "no test")} if arguments.again else set()
    names = [name for name in evenly(mutants) if (name not in done or name in again) and re.search(arguments.only, name)]
    print(f"{len(names)} of {len(mutants)} mutants to run", flush=True)
    import pytest
    import torch

    torch.set_num_threads(1)
    sys.path[:] = [str(TREE / "project"), *(path for path in sys.path if Path(path or ".").resolve() != ROOT)]
    pytest.main(["-q", "-p", "no:cacheprovider", "--rootdir=.", *TESTS], plugins=[Mutants(names, ends_at)])


if __name__ == "__main__":
    main()
