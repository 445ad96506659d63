"""What runs unattended for a long time, on medseg's public names alone; installed as `medseg_pipelines`."""
