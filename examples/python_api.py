# SPDX-License-Identifier: Apache-2.0
"""Hidden transfer in vLLM's Python API, on the demo target (``make target`` fetches it).

OMP_NUM_THREADS=2 VLLM_CPU_OMP_THREADS_BIND=nobind python examples/python_api.py
"""

from pathlib import Path

from vllm import LLM, SamplingParams

TARGET = Path(__file__).parent / "smollm2-135m"


def main() -> None:
    """Answer two questions and say how many tokens each pass of the target gave."""
    llm = LLM(
        model=str(TARGET),
        dtype="float32",
        kv_cache_memory_bytes=1 << 29,
        max_model_len=2048,
        speculative_config={
            "method": "hidden_transfer",
            "model": str(TARGET / "hidden_transfer"),
            "num_speculative_tokens": 16,
        },
        disable_log_stats=False,
    )
    questions = ["Why do leaves change colour in autumn?", "Write a limerick about a lazy cat."]
    chats = [[{"role": "user", "content": question}] for question in questions]
    for answer in llm.chat(chats, SamplingParams(temperature=0, max_tokens=96)):
        print(answer.outputs[0].text, end="\n\n")
    counters = {metric.name: metric for metric in llm.get_metrics()}
    drafts = counters["vllm:spec_decode_num_drafts"].value
    accepted = counters["vllm:spec_decode_num_accepted_tokens"].value
    print(f"{1 + accepted / drafts:.2f} tokens a pass with drafts")


if __name__ == "__main__":
    main()
