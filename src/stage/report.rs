//! Numbers with intervals, tables and samples: `report.json` and `report.html`.
