"""The builder of long instruction data: one file a task family; see docs/data.md."""
