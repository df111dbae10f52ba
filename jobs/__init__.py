"""What runs on the nodes. A module directly in here is a stage: its ``Options`` and its ``run(job)``.

A stage module can be imported without torch: heavy imports stand inside ``run``. It states
``PER_GPU``: whether it runs once per rank of its plan, or as one process.
"""
