"""Complete LightningModules and DataModules that stack the tricks."""
