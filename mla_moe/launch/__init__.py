"""Launchers: a recipe as what a cluster runs (a JobSet, a batch script, lines for TPU VMs), or as processes here."""
