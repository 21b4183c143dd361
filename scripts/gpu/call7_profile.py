# SPDX-License-Identifier: Apache-2.0
"""Call 7: where the time of the plugin's decode steps goes, by torch's profiler, at the shape of calls 4 and 5."""

from __future__ import annotations

from common import Output, need_gpu, need_kit, parser
from engines import Job, Setting, do, ours

LIMIT = 110


def main() -> None:
    tiny = parser(__doc__, "--tiny").parse_args().tiny
    if not tiny:
        need_gpu("call 7")
    need_kit("call 7")
    output = Output("call7_profile")
    setting = Setting.of(tiny)
    nodes = setting.budgets[len(setting.budgets) // 2]
    engine = setting.engine(graph=True, nodes=nodes, **ours(nodes, setting.maps()))
    do(output, setting, [Job(f"random maps, {nodes} nodes", ("profiled",), engine, 100)], LIMIT)
    for row in output.results("profile"):
        output.say(row["table"])


if __name__ == "__main__":
    main()
