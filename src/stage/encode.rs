//! Token and pixel check of every kept row, before a device is touched.
