"""What users run today, for comparison. `docs/policies/baselines.md` says who runs which."""
