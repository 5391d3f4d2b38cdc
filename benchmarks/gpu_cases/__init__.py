"""The GPU benchmark's parts: what is measured (`cases`), how on this machine (`options`), its inputs (`inputs`,
`reference`, `rewards`) and what processes are told (`tasks`), who runs it (`ours`, `unsloth_peer`, `trl_peer`,
`trl_dpo_peer`, `trl_grpo_peer`), how they are asked (`protocol`), one of them through all rounds (`sides`), those
measured together (`groups`), whether they compute the same (`parity`), what is published (`results`).

Each contender is a process of its own: `python -m gpu_cases.NAME task.json`.
"""
