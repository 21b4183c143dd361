# SPDX-License-Identifier: Apache-2.0
"""Call 5: the plugin's step times at the shape of call 4, and its draft pass alone. Waiting for the GPU is an error."""

from __future__ import annotations

from common import Output, need_gpu, need_kit, parser
from engines import NO_SYNCS, Job, Setting, do, ours, report_steps

LIMIT = 215
NODES = 15


def main() -> None:
    tiny = parser(__doc__, "--tiny").parse_args().tiny
    if not tiny:
        need_gpu("call 5")
    need_kit("call 5")
    output = Output("call5_plugin")
    setting = Setting.of(tiny)
    nodes = min(NODES, max(setting.budgets))
    maps = ours(nodes, setting.maps())

    def fixed(budget: int, graph: bool) -> Job:
        engine = setting.engine(graph=graph, nodes=budget, **ours(budget))
        name = f"fixed trees of {budget}, {'graphs' if graph else 'eager'}"
        return Job(name, ("steps",), engine, 80, NO_SYNCS)

    drafted = setting.engine(graph=True, nodes=nodes, **maps)
    jobs = [
        Job(f"random maps, {nodes} nodes, graphs", ("steps", "draft_pass"), drafted, 90, NO_SYNCS),
        fixed(nodes, graph=True),
        *(fixed(budget, graph=True) for budget in setting.budgets[::-1] if budget != nodes),
        fixed(nodes, graph=False),
    ]
    do(output, setting, jobs, LIMIT)
    report_steps(output)


if __name__ == "__main__":
    main()
