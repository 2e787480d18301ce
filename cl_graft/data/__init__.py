"""Reading examples: files of a data folder, data sets of the hub or of the same form, benchmarks' test sets."""

from cl_graft.data.readers import DataError, json_entries, labels, records, sample

__all__ = ["DataError", "json_entries", "labels", "records", "sample"]
