"""The project file `expertctl.yaml`: schema, validation and loading."""
