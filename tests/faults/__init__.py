"""Real processes, real signals and real files: what a run loses when something goes wrong."""
