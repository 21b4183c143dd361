# SPDX-License-Identifier: Apache-2.0
"""Let the demo target answer the training prompts: the data that the demo maps learn from.

Every prompt is answered once, even ones greedily, odd ones at temperature 0.8 with a fixed seed,
by vLLM itself (offline, fp32, eager). One JSON object per line: id, kind, temperature, prompt and
answer token ids. Answers are appended batch by batch, so an interrupted run goes on where it was.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer
from demo_prompts import Prompt, training_prompts
from demo_target import DEFAULT_FOLDER, REPOSITORY
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

SEED = 20261121
TEMPERATURE = 0.8
DEFAULT_OUTPUT = REPOSITORY / "work" / "demo_data.jsonl"

console = Console(highlight=False)


def answered_ids(path: Path) -> set[str]:
    """Ids that `path` already holds; a last line cut short by a kill is dropped from the file."""
    if not path.exists():
        return set()
    kept, ids = [], set()
    for line in path.read_text().splitlines():
        try:
            ids.add(json.loads(line)["id"])
        except (json.JSONDecodeError, KeyError):
            continue
        kept.append(line)
    path.write_text("".join(line + "\n" for line in kept))
    return ids


def main(
    count: Annotated[int, typer.Option(help="Training prompts to answer.")] = 1620,
    answer_tokens: Annotated[int, typer.Option(help="Tokens per answer at most.")] = 160,
    batch: Annotated[int, typer.Option(help="Prompts per batch, and requests at once.")] = 100,
    target: Annotated[Path, typer.Option(help="The demo target.")] = DEFAULT_FOLDER,
    output: Annotated[Path, typer.Option(help="JSONL to append to.")] = DEFAULT_OUTPUT,
) -> None:
    """Write the target's own answers to the training prompts."""
    # With its default process layout vLLM keeps a core free: one process, every core.
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    # In a process of its own the engine spins on a core while it waits for its worker.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ["VLLM_PLUGINS"] = ""  # stock vLLM writes the data
    from vllm import LLM, SamplingParams

    output.parent.mkdir(parents=True, exist_ok=True)
    done = answered_ids(output)
    prompts = [
        (number, prompt)
        for number, prompt in enumerate(training_prompts(count, SEED))
        if prompt.id not in done
    ]
    console.print(f"{len(done)} of {count} prompts are answered already in {output}")
    if not prompts:
        return
    llm = LLM(
        model=str(target),
        dtype="float32",
        enforce_eager=True,
        kv_cache_memory_bytes=3 << 30,
        max_model_len=1024,
        max_num_seqs=batch,
        # A seeded request whose prefill is cut into chunks fails in vLLM 0.32 on CPU.
        enable_chunked_prefill=False,
        max_num_batched_tokens=1 << 15,
        seed=SEED,
    )

    def parameters(number: int) -> SamplingParams:
        return SamplingParams(
            temperature=0.0 if number % 2 == 0 else TEMPERATURE,
            seed=SEED + number,
            max_tokens=answer_tokens,
        )

    columns = (TextColumn("answers"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with output.open("a") as file, Progress(*columns, console=console) as progress:
        task = progress.add_task("answers", total=count, completed=len(done))
        for start in range(0, len(prompts), batch):
            chunk = prompts[start : start + batch]
            outputs = llm.chat(
                [[{"role": "user", "content": prompt.text}] for _, prompt in chunk],
                [parameters(number) for number, _ in chunk],
                use_tqdm=False,
            )
            for (number, prompt), result in zip(chunk, outputs, strict=True):
                file.write(json.dumps(_record(number, prompt, result, parameters(number))) + "\n")
            file.flush()
            progress.advance(task, len(chunk))


def _record(number: int, prompt: Prompt, result: object, parameters: object) -> dict[str, object]:
    completion = result.outputs[0]  # type: ignore[attr-defined]
    return {
        "id": prompt.id,
        "kind": prompt.kind,
        "temperature": parameters.temperature,  # type: ignore[attr-defined]
        "prompt": list(result.prompt_token_ids),  # type: ignore[attr-defined]
        "answer": list(completion.token_ids),
    }


if __name__ == "__main__":
    typer.run(main)
