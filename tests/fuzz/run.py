"""Fuzz the readers: `make fuzz SECONDS=60`, or one of them: `python tests/fuzz/run.py 60 nifti`.

atheris (libFuzzer for Python) changes the bytes of the seeds so that new lines of the readers are reached. What makes a
reader do something that it does not promise is kept in data_cache/fuzz, shown here, and fails the run.
"""

import contextlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
KEPT = ROOT / "data_cache" / "fuzz"


def one(name: str, *options: str) -> None:
    """Run a target in this process, for good."""
    import atheris

    watched = [f"usjepa_nb.{m}" for m in ("camus", "splits", "images", "grid", "profile")]
    with atheris.instrument_imports(include=[*watched, "yaml", "nibabel.nifti1", "nibabel.volumeutils"]):
        import yaml  # noqa: F401
        from targets import TARGETS
    target, seeds, words = TARGETS[name]
    corpus = KEPT / name / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    for k, data in enumerate(seeds()):
        (corpus / f"seed{k:02d}").write_bytes(data)
    dictionary = KEPT / name / "words"
    dictionary.write_text("".join('"' + "".join(f"\\x{b:02x}" for b in word.encode("latin-1", "ignore") or b"?") + '"\n'
                                  for word in words))
    found = [f"-artifact_prefix={KEPT / name}/", f"-dict={dictionary}", "-rss_limit_mb=2048", "-timeout=30",
             "-print_final_stats=1", "-max_len=20000"]
    atheris.Setup([sys.argv[0], *found, *options, str(corpus)], lambda data: target(data))
    atheris.Fuzz()


def fuzz(name: str, *options: str) -> dict:
    """Run a target in a process of its own -> name, executions, crash ("" where there is none)."""
    done = subprocess.run([sys.executable, __file__, "--one", name, *options], capture_output=True, text=True,
                          cwd=HERE, env=os.environ | {"OMP_NUM_THREADS": "1"}, errors="replace")
    text = done.stdout + done.stderr
    count = re.search(r"stat::number_of_executed_units:\s*(\d+)", text) or re.search(r"Done (\d+) runs", text)
    crash = ""
    if done.returncode:
        kept = re.search(r"Test unit written to (\S+)", text)
        lines = re.findall(r"^(?:[\w.]*(?:Error|Exception|Interrupt)\b|==\d+== ERROR).*", text, re.MULTILINE)
        crash = f"{lines[0] if lines else text[-400:]} [{kept[1] if kept else 'nothing kept'}]"
        if kept:
            with contextlib.suppress(OSError):
                crash += f" {Path(kept[1]).read_bytes()[:200]!r}"
    return {"target": name, "executions": int(count[1]) if count else 0, "crash": crash}


def main(argv: list[str]) -> int:
    if argv[:1] == ["--one"]:
        one(*argv[1:])
    seconds, names = int(argv[0]) if argv else 30, argv[1:]
    sys.path.insert(0, str(HERE))
    from targets import TARGETS

    try:
        import atheris  # noqa: F401
    except ImportError:
        print("atheris is not installed (it is for Linux and Python up to 3.13): pip install atheris", file=sys.stderr)
        return 1
    wrong = False
    for name in names or TARGETS:
        result = fuzz(name, f"-max_total_time={seconds}")
        wrong |= bool(result["crash"]) or not result["executions"]
        print(f"{name}: {result['executions']} executions in {seconds} s, {result['crash'] or 'no crash'}", flush=True)
        with open(KEPT / "runs.jsonl", "a") as log:
            log.write(json.dumps(result | {"seconds": seconds}) + "\n")
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
