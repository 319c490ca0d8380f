"""Plans: what visual tokens compute, layer by layer. Data, checks and files; nothing here knows a model or a tensor."""
