//! What the catalog says of the tables that the rules name.
