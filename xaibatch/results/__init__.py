"""Results: schema, atomic Parquet parts, SQL, statistics, report."""
