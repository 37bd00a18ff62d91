"""Pictures, tables and pages from arrays and result rows; never from models, data sets or runs in memory."""
