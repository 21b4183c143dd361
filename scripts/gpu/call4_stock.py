# SPDX-License-Identifier: Apache-2.0
"""Call 4: stock vLLM's step times at an 8B shape with dummy weights: eager, by full graphs, and its chain of 15."""

from __future__ import annotations

from common import Output, need_gpu, need_kit, parser
from engines import Job, Setting, do, ngram, report_steps

LIMIT = 185
CHAIN = 15


def main() -> None:
    tiny = parser(__doc__, "--tiny").parse_args().tiny
    if not tiny:
        need_gpu("call 4")
    need_kit("call 4")
    output = Output("call4_stock")
    setting = Setting.of(tiny)
    jobs = [
        Job("stock, graphs", ("steps",), setting.engine(graph=True), 80),
        Job(
            f"n-gram chain of {CHAIN}, graphs",
            ("steps",),
            setting.engine(graph=True, nodes=CHAIN, **ngram(CHAIN)),
            80,
        ),
        Job("stock, eager", ("steps",), setting.engine(graph=False), 80),
    ]
    do(output, setting, jobs, LIMIT)
    report_steps(output)


if __name__ == "__main__":
    main()
