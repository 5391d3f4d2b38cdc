"""The GPU benchmark's parts: what is measured (`cases`), its inputs (`inputs`), who runs it (`ours`, `unsloth_peer`,
`trl_peer`), how they are asked (`protocol`), whether they compute the same (`parity`), what is published (`results`).

Each contender is a process of its own: `python -m gpu_cases.NAME task.json`.
"""
