"""Other tools' and data sets' forms of judgments, one small file each; `table` lists them by name."""
